"""The formats of a row, told apart by their keys, and turned into messages.

    prompt/completion   {"prompt": "…", "completion": "…"}
    messages            {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    alpaca              {"instruction": "…", "input": "…", "output": "…"}            input may be missing
    sharegpt            {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}
    text                {"text": "…"}

All but text may carry a `system` prompt; prompt/completion and alpaca also a `history` of earlier turns. A row is taken
as it is or refused with a reason; nothing is repaired. The names are those of the field: OpenAI's chat rows, Stanford
Alpaca, ShareGPT dumps. A further format is one more entry of `_FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from lmtune.data.turns import REASONING_KEYS, UNSUPPORTED, ParsedRow, parse_turns
from lmtune.data.types import Message
from lmtune.data.values import (
    RowFault,
    is_filled,
    key_problems,
    kind_of,
    listed_keys,
    nearest,
    plain,
    plain_table,
    quoted,
    strings,
)

Format = Literal["prompt/completion", "messages", "alpaca", "sharegpt", "text"]
_Row = Mapping[str, Any]

_SYSTEM_KEYS = ("system", "system_prompt", "system_message")
_EXPECTED = (
    "a row has the keys prompt and completion, or messages, or instruction and output (alpaca), "
    "or conversations (sharegpt), or text"
)
_ANSWER_KEYS = ("completion", "answer", "response", "output", "reply", "target", "assistant", "gpt", "bot")
_QUESTION_KEYS = ("prompt", "question", "query", "instruction", "input", "user", "human")
# Keys that say what would be lost, and what to do. A key that the row's format knows is not looked up.
_REFUSED = UNSUPPORTED | plain_table(
    (
        ("chosen", "rejected", "preferred_output", "non_preferred_output", "chosen_response", "rejected_response"),
        "preferences are not supported yet; to train on the better answer alone, write prompt and completion",
    ),
    (
        REASONING_KEYS,
        "this reasoning would be lost; write it into the answer as <think>…</think> with data.template: thinking",
    ),
    (_SYSTEM_KEYS, "this format has no system prompt; write the row as prompt and completion"),
    (("system_instruction", "developer"), "if this is the system prompt, name it system; else remove the key"),
    (
        ("history", "chat_history", "conversation_history"),
        "earlier turns would be lost; write them as turns of messages, or as [question, answer] pairs under history "
        "beside prompt or instruction",
    ),
    (("train_on_input", "train_on_inputs"), "only answers are trained, never questions; remove the key"),
)
_LABELS = {plain(key) for key in ("label", "kto_label", "kto_tag")}
_ANSWERS = {plain(key) for key in (*_ANSWER_KEYS, "answers", "responses", "outputs", "summary")}
_CONTEXT = {
    plain(key) for key in ("context", "passage", "document", "input", "query", "rationale", "explanation", "label")
}


def detect_format(row: _Row) -> Format:
    """The format whose required keys the row has.

    Raises:
        RowFault: the keys fit none; says which key is missing or probably meant.
    """
    for name, (required, _, _) in _FORMATS.items():
        if all(key in row for key in required):
            return name
    if problems := key_problems(row, (), _REFUSED):
        raise RowFault("; ".join(problems))
    for required, _, _ in _FORMATS.values():
        if found := [key for key in required if key in row]:
            missing = [key for key in required if key not in row]
            hint = nearest(missing[0], row) or _renaming(row)
            raise RowFault(f"{' and '.join(missing)} missing beside {' and '.join(found)}{hint}")
    what = f"unknown keys {listed_keys(row)}{_renaming(row)}" if row else "the row is empty"
    raise RowFault(f"{what}; {_EXPECTED}")


def _renaming(row: _Row) -> str:
    """Which keys would make a row if they were renamed, or nothing."""
    if turns := [key for key, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]:
        return f"; rename {quoted(turns[0])} to messages"
    questions, answers = ([key for key in row if plain(key) in names] for names in (_QUESTION_KEYS, _ANSWER_KEYS))
    if len(questions) != 1 or len(answers) != 1:
        return ""
    wanted = zip((questions[0], answers[0]), ("prompt", "completion"), strict=True)
    return "; rename " + " and ".join(f"{quoted(old)} to {new}" for old, new in wanted if old != new)


def parse_row(row: _Row, format: Format) -> ParsedRow:
    """The row's messages or text.

    Raises:
        RowFault: a value is missing, of the wrong type, empty where it is trained, roles are out of order, or the row
            says more than would be trained.
    """
    required, optional, parse = _FORMATS[format]
    known = (*required, *optional)
    further = sorted(row.keys() - known)
    if problems := further and _further_problems(row, known, further):
        raise RowFault("; ".join(problems))
    parsed = parse(row)
    for key in further:
        if is_filled(row[key]) and (plain(key) in _CONTEXT or _is_other_answer(row, key, known)):
            parsed.warnings.append(f"{key} is neither in the question nor trained; write it into one of them if needed")
        elif row[key] is False or is_filled(row[key]):
            parsed.ignored_keys.add(key)
    for message in parsed.messages:
        if not message.content.strip() and message.role == "assistant" and message.trained:
            parsed.warnings.append("an answer holds only white space")
        elif not message.content.strip() and message.role == "user":
            parsed.warnings.append("a question is empty")
    return parsed


def _further_problems(row: _Row, known: tuple[str, ...], further: list[str]) -> list[str]:
    problems = key_problems(row, known, _REFUSED)
    for key in further:
        name, value = plain(key), row[key]
        if name == "weight" and value is not None and (isinstance(value, str) or value != 1):
            problems.append(f"{key} is {kind_of(value)}; weights of rows are not used yet: remove the key, or the row")
        elif name in _LABELS and value in (0, 1):
            problems.append(f"{key} is {kind_of(value)}; labels are not supported yet: remove the key, or the row")
        elif "text" in known and _is_other_answer(row, key, known):
            problems.append(f"{key} beside text would not be trained; name them prompt and completion, or remove {key}")
    return problems


def _is_other_answer(row: _Row, key: str, known: tuple[str, ...]) -> bool:
    """Whether `key` holds an answer that stands in none of the row's known values."""
    value = row[key]
    if plain(key) not in _ANSWERS or not isinstance(value, str) or not is_filled(value):
        return False
    return all(value.strip() not in str(row[name]) for name in known if name in row)


def _prompt_completion(row: _Row) -> ParsedRow:
    prompt, completion = strings(row, "prompt", "completion", filled="completion")
    return _with_context(row, Message("user", prompt), Message("assistant", completion))


def _alpaca(row: _Row) -> ParsedRow:
    instruction, output = strings(row, "instruction", "output", filled="output")
    if row.get("input") not in (None, ""):  # exporters write a missing input as null
        instruction = "\n\n".join([instruction, *strings(row, "input")])
    return _with_context(row, Message("user", instruction), Message("assistant", output))


def _text(row: _Row) -> ParsedRow:
    (text,) = strings(row, "text", filled="text")
    return ParsedRow(text=text, warnings=[] if text.strip() else ["a text holds only white space"])


def _messages(row: _Row) -> ParsedRow:
    return _with_system(row, parse_turns(row["messages"], "messages"))


def _sharegpt(row: _Row) -> ParsedRow:
    return _with_system(row, parse_turns(row["conversations"], "conversations"))


def _with_context(row: _Row, *turns: Message) -> ParsedRow:
    """`turns` behind those in `history`, a list of [question, answer] pairs, as LLaMA-Factory writes them."""
    history, earlier = row.get("history"), list[Message]()
    for index, pair in enumerate(history if isinstance(history, list) else [history] * is_filled(history)):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowFault("history must be a list of [question, answer] pairs; or write the row as messages")
        named = {"[0]": pair[0], "[1]": pair[1]}
        question, answer = strings(named, "[0]", "[1]", prefix=f"history[{index}]", filled="[1]")
        earlier += [Message("user", question), Message("assistant", answer)]
    return _with_system(row, ParsedRow((*earlier, *turns)))


def _with_system(row: _Row, parsed: ParsedRow) -> ParsedRow:
    """`parsed` with the row's own system prompt first."""
    given = [key for key in _SYSTEM_KEYS if is_filled(row.get(key))]
    own = [message.content for message in parsed.messages[:1] if message.role == "system"]
    prompts = {*own, *strings(row, *given)}
    if len(prompts) > 1:
        raise RowFault(f"{' and '.join([*given, *['the system turn'] * len(own)])} differ; keep one")
    if prompts and not own:
        parsed.messages = (Message("system", prompts.pop()), *parsed.messages)
    return parsed


# Required keys, optional keys, parser. The first that fits is taken: Alpaca's own files carry a "text" column too, chat
# dumps often a "prompt".
_FORMATS: dict[Format, tuple[tuple[str, ...], tuple[str, ...], Callable[[_Row], ParsedRow]]] = {
    "messages": (("messages",), _SYSTEM_KEYS, _messages),
    "sharegpt": (("conversations",), _SYSTEM_KEYS, _sharegpt),
    "prompt/completion": (("prompt", "completion"), (*_SYSTEM_KEYS, "history"), _prompt_completion),
    "alpaca": (("instruction", "output"), ("input", *_SYSTEM_KEYS, "history"), _alpaca),
    "text": (("text",), (), _text),
}
