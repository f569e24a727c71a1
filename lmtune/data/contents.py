"""What a row of a known format holds: its messages or text, its second answer, its label.

Each function takes the row as JSON has it, and raises `RowFault` for a value that is missing, of the wrong type, or
contradicts another. `lmtune.data.formats` says which function is for which keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lmtune.data.tools import TOOL_KEYS, read_tools
from lmtune.data.turns import UNSUPPORTED, ParsedRow, from_transcript, is_answer, parse_answer, parse_turns
from lmtune.data.types import Label, Message
from lmtune.data.values import RowFault, is_filled, key_problems, kind_of, plain, quoted, strings
from lmtune.io.text import is_finite_number

Row = Mapping[str, Any]
SYSTEM_KEYS = ("system", "system_prompt", "system_message")
_PROMPTS = ("prompt", "messages", "conversations", "instruction")  # where a pair's prompt may be
QUESTION_KEYS = ("prompt", "question", "query", "instruction", "input", "user", "human")


def prompt_completion(row: Row) -> ParsedRow:
    """A question and its answer, each a text or, as TRL's data sets have them, turns."""
    if any(isinstance(row[key], (list, dict)) for key in ("prompt", "completion")):
        _refuse_history(row)
        return _with_system(row, _with_tools(row, parse_turns(_asked_and_answered(row), "prompt+completion")))
    if given := [key for key in TOOL_KEYS if is_filled(row.get(key))]:
        raise RowFault(f"{given[0]}: {UNSUPPORTED[given[0]]}")
    prompt, completion = strings(row, "prompt", "completion", filled="completion")
    return _with_context(row, Message("user", prompt), Message("assistant", completion))


def _asked_and_answered(row: Row) -> list[Any]:
    """The turns of the prompt, whose answers are context, and those of the completion."""
    turns: dict[str, list[Any]] = {}
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = row[key]
        if isinstance(value, str):
            value = [{"role": role, "content": strings(row, key, filled="completion")[0]}]
        turns[key] = [value] if isinstance(value, dict) else value
        if not isinstance(turns[key], list) or not turns[key]:
            raise RowFault(f"{key} is {kind_of(value)}; it must be a text or a list of turns")
    answered = [{**turn, "weight": 0} if is_answer(turn) else turn for turn in turns["prompt"]]
    return [*answered, *turns["completion"]]


def alpaca(row: Row) -> ParsedRow:
    """An instruction, perhaps with an input, and its answer."""
    _, output = strings(row, "instruction", "output", filled="output")
    return _with_context(row, Message("user", _instruction(row)), Message("assistant", output))


def _instruction(row: Row) -> str:
    names = ("instruction", *(["input"] * (row.get("input") not in (None, ""))))  # exporters write none as null
    return "\n\n".join(strings(row, *names))


def text(row: Row) -> ParsedRow:
    """A plain text."""
    (text,) = strings(row, "text", filled="text")
    return ParsedRow(text=text, warnings=[] if text.strip() else ["a text holds only white space"])


def messages(row: Row) -> ParsedRow:
    """A conversation."""
    return _with_system(row, _with_tools(row, parse_turns(row["messages"], "messages")))


def sharegpt(row: Row) -> ParsedRow:
    """A conversation under the name that ShareGPT dumps have for it."""
    return _with_system(row, _with_tools(row, parse_turns(row["conversations"], "conversations")))


def _with_context(row: Row, *turns: Message) -> ParsedRow:
    """`turns` behind those in `history`, a list of [question, answer] pairs, as LLaMA-Factory writes them."""
    history, earlier = row.get("history"), list[Message]()
    for index, pair in enumerate(history if isinstance(history, list) else [history] * is_filled(history)):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowFault("history must be a list of [question, answer] pairs; or write the row as messages")
        named = {"[0]": pair[0], "[1]": pair[1]}
        question, answer = strings(named, "[0]", "[1]", prefix=f"history[{index}]", filled="[1]")
        earlier += [Message("user", question), Message("assistant", answer)]
    return _with_system(row, ParsedRow((*earlier, *turns)))


def _with_system(row: Row, parsed: ParsedRow) -> ParsedRow:
    """`parsed` with the row's own system prompt first."""
    given = [key for key in SYSTEM_KEYS if is_filled(row.get(key))]
    own = [message.content for message in parsed.messages[:1] if message.role == "system"]
    prompts = {*own, *strings(row, *given)}
    if len(prompts) > 1:
        raise RowFault(f"{' and '.join([*given, *['the system turn'] * len(own)])} differ; keep one")
    if prompts and not own:
        parsed.messages = (Message("system", prompts.pop()), *parsed.messages)
    return parsed


def _with_tools(row: Row, parsed: ParsedRow, prefix: str = "") -> ParsedRow:
    """`parsed` with the row's own tools."""
    parsed.tools = read_tools(row, parsed.warnings, prefix)
    if parsed.tools:
        named = {json.loads(tool)["function"]["name"] for tool in parsed.tools}
        called = {call.name for turn in (*parsed.messages, *parsed.rejected) for call in turn.tool_calls}
        if called - named:
            parsed.warnings.append("a call of a tool that is not in tools; correct its name, or add it to tools")
            parsed.outcomes.add("unlisted_tools")
    return parsed


def pair(row: Row) -> ParsedRow:
    """A pair whose answers stand behind the prompt of the row, or as conversations that repeat it."""
    if all(row.get(key) is None for key in _PROMPTS):
        row = {**row, **{key: from_transcript(row[key]) or row[key] for key in ("chosen", "rejected")}}
    begins = any(isinstance(row[key], list) and len(row[key]) > 1 for key in ("chosen", "rejected"))
    asked = _asked(row, *(_PROMPTS[:1] if begins else _PROMPTS))
    parsed = _with_tools(row, _paired(row, None if begins else asked, "chosen", "rejected"))
    texts = {turn.content.strip() for turn in parsed.messages}
    if asked is not None and not all(turn.content.strip() in texts for turn in asked.messages):
        raise RowFault("prompt is not the one that chosen and rejected begin with; keep one")
    if begins:
        _refuse_history(row)
    parsed.ignored_keys |= {key for key in (*_PROMPTS, "input") if is_filled(row.get(key))} - _used(row, begins)
    for key in sorted(parsed.ignored_keys & {"instruction", "input"}):
        parsed.warnings.append(f"{key} is not in the prompt; write it into the prompt if needed")
    return parsed


def _used(row: Row, begins: bool) -> set[str]:
    """The keys that a pair's prompt is read from."""
    key = next((key for key in _PROMPTS[: 1 if begins else None] if row.get(key) is not None), "")
    return {key, "input"} if key == "instruction" else {key}


def openai_pair(row: Row) -> ParsedRow:
    """A row of OpenAI's preference files."""
    given = row["input"]
    if not isinstance(given, dict):
        raise RowFault(f"input is {kind_of(given)}; it must be an object with messages")
    if problems := key_problems(given, ("messages", *TOOL_KEYS), UNSUPPORTED, prefix="input."):
        raise RowFault("; ".join(problems))
    asked = parse_turns(given.get("messages"), "input.messages", "question")
    parsed = _with_tools(given, _paired(row, asked, "preferred_output", "non_preferred_output"), "input.")
    unused = [key for key in given if key not in ("messages", *TOOL_KEYS) and given[key] not in (None, "", [], {})]
    parsed.ignored_keys |= {f"input.{key}" for key in unused}
    return parsed


def _paired(row: Row, asked: ParsedRow | None, better: str, worse: str) -> ParsedRow:
    """The answers under the keys `better` and `worse` to what was `asked`, or to what one of them begins with."""
    found = [parse_answer(row[key], key) for key in (better, worse)]
    before = next((parsed.messages[:-1] for parsed in found if len(parsed.messages) > 1), ())
    before = before if asked is None else asked.messages
    if not before:
        named = next((f"; rename {quoted(key)} to prompt" for key in row if plain(key) in QUESTION_KEYS), "")
        raise RowFault(f"prompt is missing beside {better} and {worse}{named}")
    for parsed in found:
        parsed.messages = parsed.messages if len(parsed.messages) > 1 else (*before, *parsed.messages)
    one, other = ([_said(turn) for turn in parsed.messages] for parsed in found)
    if one[:-1] != other[:-1]:
        turn = next((index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)
        raise RowFault(
            f"{better} and {worse} differ at turn {turn + 1}, before their last answers; a pair has one prompt: end "
            "both with the first answer that differs"
        )
    chosen, rejected = (_with_system(row, parsed) for parsed in found)
    warnings = [*(asked.warnings if asked else ()), *chosen.warnings, *rejected.warnings]
    if one == other:
        warnings.append(f"{better} and {worse} are the same answer; the pair says nothing")
    return ParsedRow(
        _last_alone_trained(chosen.messages), rejected=_last_alone_trained(rejected.messages),
        warnings=list(dict.fromkeys(warnings)), ignored_keys=chosen.ignored_keys | rejected.ignored_keys,
        outcomes=chosen.outcomes | rejected.outcomes | (asked.outcomes if asked else set()),
    )  # fmt: skip


def _said(turn: Message) -> Message:
    """`turn` without what is arbitrary in it, the ids of calls, and without whether it is trained."""
    calls = tuple(replace(call, id="") for call in turn.tool_calls)
    return replace(turn, trained=True, tool_calls=calls, tool_call_id=None)


def _asked(row: Row, *keys: str) -> ParsedRow | None:
    """What a row asks under the first of `keys` that it has: a text, turns, or an instruction with its input."""
    key = next((key for key in keys if row.get(key) is not None), None)
    if key is None:
        return None
    if isinstance(row[key], list):
        _refuse_history(row)
        return parse_turns(row[key], key, "question")
    return _with_context(row, Message("user", _instruction(row) if key == "instruction" else strings(row, key)[0]))


def _refuse_history(row: Row) -> None:
    if is_filled(row.get("history")):
        raise RowFault("history beside turns would be lost; write it as turns")


def judged(row: Row) -> ParsedRow:
    """A prompt and an answer to it, each a text or turns."""
    asked, parsed = _asked(row, "prompt"), parse_answer(row["completion"], "completion")
    assert asked is not None  # `prompt` is required
    if len(parsed.messages) > 1:
        raise RowFault("completion is a conversation; expected the answer alone, or write the row as messages")
    parsed.messages = (*asked.messages, *parsed.messages)
    parsed.warnings += asked.warnings
    parsed.outcomes |= asked.outcomes
    return _judged_row(_with_system(row, parsed), row["label"])


def judged_messages(row: Row) -> ParsedRow:
    """A conversation whose last answer is good or not."""
    return _judged_row(messages(row), row["label"])


def _judged_row(parsed: ParsedRow, label: Any) -> ParsedRow:
    if not _is_verdict(label):
        raise RowFault(f"label is {kind_of(label)}; it must be true or false (also 1 or 0): whether the answer is good")
    return replace(parsed, messages=_last_alone_trained(parsed.messages), label=bool(label))


def _last_alone_trained(messages: Sequence[Message]) -> tuple[Message, ...]:
    return (*(replace(turn, trained=turn.role != "assistant") for turn in messages[:-1]), messages[-1])


def _is_verdict(label: Any) -> bool:
    return not isinstance(label, str) and label in (0, 1)


def is_judged(row: Row) -> bool:
    """Whether `label` judges an answer of the row."""
    return _is_verdict(row["label"]) and ("completion" in row or _ends_with_answer(row))


def _ends_with_answer(row: Row) -> bool:
    turns = row["messages"]
    last = turns[-1] if isinstance(turns, list) and turns else None
    return isinstance(last, dict) and str(last.get("role", last.get("from"))).lower() not in ("user", "human")


def is_conversation(row: Row) -> bool:
    """Whether turns are there for their answers, not for a label."""
    return row.get("label") is None or _ends_with_answer(row)


def _label(value: Any) -> Label:
    """What a labelled row is: a text, a number, a truth, or texts of which each holds."""
    if isinstance(value, list):
        named = {f"label[{index}]": item for index, item in enumerate(value)}
        return tuple(strings(named, *named))
    if isinstance(value, str):
        return strings({"label": value}, "label", filled="label")[0]
    if isinstance(value, bool) or is_finite_number(value):
        number: Label = int(value) if isinstance(value, float) and value.is_integer() else value  # 1 and 1.0 are one
        return number
    raise RowFault(f"label is {kind_of(value)}; it must be a text, a number, or a list of texts")


def labelled_text(row: Row) -> ParsedRow:
    """A plain text with its label."""
    return replace(text(row), label=_label(row["label"]))


def labelled_prompt(row: Row) -> ParsedRow:
    """A question with its label."""
    asked = _asked(row, "prompt")
    assert asked is not None  # `prompt` is required
    return replace(_with_system(row, asked), label=_label(row["label"]))


def labelled_messages(row: Row) -> ParsedRow:
    """A conversation with its label, which may end with the user or the assistant."""
    parsed = _with_tools(row, parse_turns(row["messages"], "messages", "any"))
    return replace(_with_system(row, parsed), label=_label(row["label"]))
