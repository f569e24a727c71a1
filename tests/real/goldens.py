"""Every form of row with real tokenizers, as text that a person has looked at: what is trained stands in ⟦ ⟧.

    LMTUNE_REAL=.venv/real python -m tests.real.goldens        # writes tests/real/goldens/*.txt; look at each change

One file a tokenizer. A row that is refused stands there with its reason. The hash beside the counts is of the token ids
and of which of them are trained. A long beginning (of tools) is written out once and has a number from then on.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lmtune.data.formats import detect_format, kind_of_format, parse_row
from lmtune.data.rendering import Renderer
from lmtune.data.types import Example, TokenSequence
from lmtune.errors import DataError
from tests.real.folders import template_of, tokenizer_of
from tests.tokenizers import LLAMA2

FOLDER = Path(__file__).with_name("goldens")
# By name: the tokenizer, and its template: None its own, else one of the collection, or of `tests.tokenizers`.
TOKENIZERS = {
    "qwen3": ("qwen3", None), "llama3_1": ("llama3_1", None), "gemma3": ("gemma3", None),
    "deepseek_v3": ("deepseek_v3", None), "gptoss": ("gptoss", "gptoss"), "llama2": ("llama2", LLAMA2),
    # with templates that have tools
    "llama3_1_tools": ("llama3_1", "llama3_1"), "deepseek_v3_tools": ("deepseek_v3", "deepseekv3"),
    "gemma3_tools": ("gemma3", "gemma4_v5"),
}  # fmt: skip
_LONG_HEAD = 150  # characters
_NOW = "2026-11-26 12:00:00"  # which gpt-oss writes
_PROPERTIES = {"on": {"type": "boolean"}, "room": {"type": "string"}}
_TOOL = {"type": "function", "function": {
    "name": "lamp", "description": "Switches a lamp.",
    "parameters": {"type": "object", "properties": _PROPERTIES, "required": ["on"]},
}}  # fmt: skip
_S, _U, _V = ({"role": role, "content": text} for role, text in (
    ("system", "Be brief."), ("user", "Is the lamp on?"), ("user", "And in the Küche 厨?")))  # fmt: skip
_A, _B = ({"role": "assistant", "content": text} for text in ("Yes.", "No, 不."))
_THOUGHT = {**_A, "reasoning_content": "I look."}


def _calls(*arguments: Any, **further: Any) -> dict[str, Any]:
    calls = [{"id": f"call_{n}", "type": "function", "function": {"name": "lamp", "arguments": given}}
             for n, given in enumerate(arguments)]  # fmt: skip
    return {"role": "assistant", "content": None, "tool_calls": calls, **further}


def _results(*texts: str) -> list[dict[str, Any]]:
    return [{"role": "tool", "tool_call_id": f"call_{n}", "content": text} for n, text in enumerate(texts)]


def _talk(*turns: Any, **further: Any) -> dict[str, Any]:
    return {"messages": list(turns), **further}


ROWS: dict[str, dict[str, Any]] = {
    "prompt and completion": {"prompt": "Is the lamp on?", "completion": "Yes."},
    "prompt and completion, system and history": {
        "system": "Be brief.", "history": [["Is the lamp on?", "Yes."]], "prompt": "Sure?", "completion": "No."},
    "alpaca": {"instruction": "Translate.", "input": "lamp", "output": "Lampe"},
    "sharegpt, system": {"system": "Be brief.", "conversations": [
        {"from": "human", "value": "Is the lamp on?"}, {"from": "gpt", "value": "Yes."}]},
    "text": {"text": "The lamp is on."},
    "messages of two answers": _talk(_S, _U, _A, _V, _B),
    "indented answer, blanks at its end": _talk(_U, {**_A, "content": "    lamp = 1\n    on = 2  \n"}),
    "control tokens in a question and an answer": _talk(
        {**_U, "content": "<|im_end|><|eot_id|></s>"},
        {**_A, "content": "a <|im_end|> <|eot_id|> <end_of_turn> <|return|> </s> b"}),
    "an answer of weight 0": _talk(_U, {**_A, "weight": 0}, _V, {**_B, "weight": 1}),
    "developer, two system turns": _talk({**_S, "role": "developer"}, {**_S, "content": "Be polite."}, _U, _A),
    "turns joined, cut at both ends": _talk(_A, _U, _V, _A, _B, _U),
    "a later system turn": _talk(_U, _A, {**_S, "content": "It is night."}, _V, _B),
    "pair": {"prompt": "Is the lamp on?", "chosen": "Yes.", "rejected": "No."},
    "judged": {"prompt": "Is the lamp on?", "completion": "Yes.", "label": True},
    "labelled text": {"text": "The lamp is on.", "label": "good"},
    "labelled prompt": {"prompt": "Is the lamp on?", "label": "question"},
    "call, result, answer": _talk(
        _U, _calls('{"on": true, "room": "Küche \\"厨\\"\\n", "watts": 1.50, "n": [1, null, -0.0, 1e3]}'),
        *_results('{"ok": true}'), _A, tools=[_TOOL]),
    "call with text beside it": _talk(_S, _U, _calls({"on": False}, content="One moment."), tools=[_TOOL]),
    "two calls, two results": _talk(
        _U, _calls({"on": True}, {"on": False, "room": "<|im_end|>"}), *_results("ok", "no"), _A, tools=[_TOOL]),
    "sharegpt call": {"tools": json.dumps([_TOOL["function"]]), "conversations": [
        {"from": "human", "value": "Is the lamp on?"},
        {"from": "function_call", "value": '{"name": "lamp", "arguments": {"on": true}}'},
        {"from": "observation", "value": "ok"}, {"from": "gpt", "value": "Done."}]},
    "call without a list of tools": _talk(_U, _calls({}), *_results("ok"), _A),
    "tools without a call": _talk(_U, _A, tools=[_TOOL]),
    "pair of calls": {"input": {"messages": [_U], "tools": [_TOOL]}, "preferred_output": [_calls({"on": True})],
                      "non_preferred_output": [_B]},
    "reasoning": _talk(_U, _THOUGHT),
    "reasoning in content, once with, once without": _talk(_U, {**_A, "content": "<think>I look.</think>Yes."}, _V, _B),
    "reasoning in history": _talk(_U, _THOUGHT, _V, {**_B, "reasoning": "I look again."}),
    "reasoning before a call and after its result": _talk(
        _U, _calls({"on": True}, reasoning_content="It is dark."), *_results("ok"), _THOUGHT, tools=[_TOOL]),
    "reasoning before a call alone": _talk(
        _U, _calls({"on": True}, thinking="It is dark."), *_results("ok"), _A, tools=[_TOOL]),
}  # fmt: skip
# Rows that do not differ when answers may hold reasoning are shown once.
THINKING = [name for name in ROWS if "reasoning" in name or name in ("prompt and completion", "call, result, answer")]


def golden(name: str) -> str:
    """What the file of a tokenizer must hold."""
    tokenizer, template = TOKENIZERS[name]
    source = template if template is None or "{" in template else template_of(template)
    blocks: list[str] = []
    heads: dict[str, str] = {}
    for option, rows in (("auto", list(ROWS)), ("thinking", THINKING)):
        renderer = Renderer(tokenizer_of(tokenizer, source), option, now=_NOW)  # type: ignore[arg-type]
        blocks.append(f"##### data.template: {option}; stops at {', '.join(renderer.stop_tokens)}\n")
        blocks += [f"=== {row}\n{_shown(renderer, ROWS[row], heads)}\n" for row in rows]
    return "\n".join(blocks)


def _shown(renderer: Renderer, row: dict[str, Any], heads: dict[str, str]) -> str:
    format = detect_format(row)
    parsed = parse_row(row, format)
    example = Example(
        "row", 1, parsed.messages, parsed.text, parsed.rejected, parsed.label, kind=kind_of_format(format),
        tools=parsed.tools,
    )  # fmt: skip
    try:
        sequences = renderer.render(example)
    except DataError as error:
        return f"FAULT {str(error).removeprefix('row:1: ')}"
    return "\n".join(_marked(renderer, sequence, heads) for sequence in sequences)


def _marked(renderer: Renderer, sequence: TokenSequence, heads: dict[str, str]) -> str:
    ids, mask = sequence.input_ids.tolist(), sequence.loss_mask.tolist()
    text, start = "", 0
    while start < len(ids):
        end = next((at for at in range(start, len(ids)) if mask[at] != mask[start]), len(ids))
        part = str(renderer.tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))
        text += f"⟦{part}⟧" if mask[start] else part
        start = end
    head = text.partition("Is the lamp on?")[0]
    if head in heads:
        text = f"[{heads[head]}]{text.removeprefix(head)}"
    elif len(head) > _LONG_HEAD:
        heads[head] = f"beginning {len(heads) + 1}"
        text = f"[{heads[head]}:]{text}"
    digest = hashlib.sha256(json.dumps([ids, mask]).encode()).hexdigest()[:12]
    return f"--- {len(ids)} tokens, {sum(mask)} trained, {digest}\n{text}"


if __name__ == "__main__":
    for each in TOKENIZERS:
        (FOLDER / f"{each}.txt").write_text(golden(each), encoding="utf-8")
