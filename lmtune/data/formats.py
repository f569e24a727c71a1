"""The five formats of a row, told apart by their keys, and turned into messages.

    prompt/completion   {"prompt": "…", "completion": "…"}
    messages            {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    alpaca              {"instruction": "…", "input": "…", "output": "…"}            input may be missing
    sharegpt            {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}
    text                {"text": "…"}

All but text may carry a `system` prompt; prompt/completion and alpaca also a `history` of earlier turns. A row is taken
as it is or refused with a reason; nothing is repaired. What further keys mean stands in `lmtune.data.turns`. The
names are those of the field: OpenAI's chat rows, Stanford Alpaca, ShareGPT dumps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lmtune.data.turns import (
    ANSWER_KEYS,
    HISTORY_KEY,
    SYSTEM_KEYS,
    earlier_turns,
    further_problems,
    further_warnings,
    parse_turns,
    preference_fault,
    with_system,
)
from lmtune.data.types import Message
from lmtune.data.values import RowFault, is_filled, listed_keys, nearest, plain, quoted, strings

__all__ = ["Format", "ParsedRow", "RowFault", "detect_format", "parse_row", "quoted"]

Format = Literal["prompt/completion", "messages", "alpaca", "sharegpt", "text"]

# In the order of their claim: Alpaca's own files carry a "text" column too, chat dumps often a "prompt".
_KEYS: dict[Format, tuple[tuple[str, ...], tuple[str, ...]]] = {  # required, optional
    "messages": (("messages",), SYSTEM_KEYS),
    "sharegpt": (("conversations",), SYSTEM_KEYS),
    "prompt/completion": (("prompt", "completion"), (*SYSTEM_KEYS, HISTORY_KEY)),
    "alpaca": (("instruction", "output"), ("input", *SYSTEM_KEYS, HISTORY_KEY)),
    "text": (("text",), ()),
}
KNOWN = (
    "a row has the keys prompt and completion, or messages, or instruction and output (alpaca), "
    "or conversations (sharegpt), or text"
)
_TURNS_NAMES = (
    "messages",
    "conversations",
    "message",
    "dialog",
    "dialogs",
    "dialogue",
    "dialogues",
    "conversation",
    "chat",
    "chats",
    "turns",
    "contents",
)
_QUESTION_NAMES = ("prompt", "question", "query", "instruction", "input", "user", "human")


@dataclass
class ParsedRow:
    """A row's content, and what is odd about it though it is used."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    ignored_keys: frozenset[str] = frozenset()
    warnings: list[str] = field(default_factory=list)


def detect_format(row: Mapping[str, Any]) -> Format:
    """The format whose required keys the row has.

    Raises:
        RowFault: the keys fit none; says which key is missing or probably meant.
    """
    for name, (required, _) in _KEYS.items():
        if all(key in row for key in required):
            return name
    if fault := preference_fault(row):
        raise RowFault(fault)
    if turns := [key for key, value in row.items() if plain(key) in _TURNS_NAMES and isinstance(value, list)]:
        raise RowFault(f"unknown key {quoted(turns[0])}; rename it to messages")
    for required, _ in _KEYS.values():
        found = [key for key in required if key in row]
        if found:
            missing = [key for key in required if key not in row]
            hint = nearest(missing[0], row) or _renaming(row)
            raise RowFault(f"{' and '.join(missing)} missing beside {' and '.join(found)}{hint}")
    if not row:
        raise RowFault(f"the row is empty; {KNOWN}")
    raise RowFault(f"unknown keys {listed_keys(row)}{_renaming(row)}; {KNOWN}")


def _renaming(row: Mapping[str, Any]) -> str:
    """Which keys would make a question and an answer if they were renamed, or nothing."""
    questions, answers = ([key for key in row if plain(key) in names] for names in (_QUESTION_NAMES, ANSWER_KEYS))
    if len(questions) != 1 or len(answers) != 1:
        return ""
    wanted = zip((questions[0], answers[0]), ("prompt", "completion"), strict=True)
    return "; rename " + " and ".join(f"{quoted(old)} to {new}" for old, new in wanted if old != new)


def parse_row(row: Mapping[str, Any], format: Format) -> ParsedRow:
    """The row's messages or text.

    Raises:
        RowFault: a value is missing, of the wrong type, empty where it is learned, roles are out of order, or the row
            says more than would be learned.
    """
    required, optional = _KEYS[format]
    known, parsed = (*required, *optional), ParsedRow()
    problems = []
    try:
        parsed = _PARSERS[format](row)
    except RowFault as fault:
        problems.append(str(fault))
    further = row.keys() - known
    if further:
        problems += further_problems(row, known, format == "text")
    if problems:
        raise RowFault("; ".join(problems))
    if further:
        learned = parsed.text or "\n".join(m.content for m in parsed.messages if m.role == "assistant")
        warned = further_warnings(row, known, learned)
        parsed.warnings += warned.values()
        parsed.ignored_keys |= {key for key in further - warned.keys() if row[key] is False or is_filled(row[key])}
    for message in parsed.messages:
        if message.role == "assistant" and message.trained and not message.content.strip():
            parsed.warnings.append("an answer holds only white space")
        elif message.role == "user" and not message.content.strip():
            parsed.warnings.append("a question is empty")
    return parsed


def _prompt_completion(row: Mapping[str, Any]) -> ParsedRow:
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        raise RowFault("prompt and completion are lists; write both as one list of turns under messages")
    prompt, completion = strings(row, "prompt", "completion", filled="completion")
    return _one_more_turn(row, prompt, completion)


def _alpaca(row: Mapping[str, Any]) -> ParsedRow:
    instruction, output = strings(row, "instruction", "output", filled="output")
    more = row.get("input")
    if more is not None and more != "":  # exporters write a missing input as null
        (more,) = strings(row, "input")
        instruction = f"{instruction}\n\n{more}"
    return _one_more_turn(row, instruction, output)


def _one_more_turn(row: Mapping[str, Any], question: str, answer: str) -> ParsedRow:
    turns = (*earlier_turns(row), Message("user", question), Message("assistant", answer))
    return ParsedRow(messages=with_system(row, turns))


def _text(row: Mapping[str, Any]) -> ParsedRow:
    (text,) = strings(row, "text", filled="text")
    if given := [key for key in SYSTEM_KEYS if is_filled(row.get(key))]:
        raise RowFault(f"{given[0]} beside text, which is learned as it stands; write the row as prompt and completion")
    warnings = [] if text.strip() else ["a text holds only white space"]
    return ParsedRow(text=text, warnings=warnings)


def _messages(row: Mapping[str, Any]) -> ParsedRow:
    return _turns(row, "messages")


def _sharegpt(row: Mapping[str, Any]) -> ParsedRow:
    return _turns(row, "conversations")


def _turns(row: Mapping[str, Any], key: str) -> ParsedRow:
    other = row.get("conversations")
    if key == "messages" and is_filled(other) and other != row[key]:
        raise RowFault("messages and conversations differ; keep one of them")
    turns = parse_turns(row[key], key)
    return ParsedRow(with_system(row, turns.messages, key), None, frozenset(turns.ignored_keys), turns.warnings)


_PARSERS: dict[Format, Callable[[Mapping[str, Any]], ParsedRow]] = {
    "prompt/completion": _prompt_completion, "messages": _messages, "alpaca": _alpaca, "sharegpt": _sharegpt,
    "text": _text,
}  # fmt: skip
