"""The five formats of a row, told apart by their keys, and turned into messages.

    prompt/completion   {"prompt": "…", "completion": "…"}
    messages            {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    alpaca              {"instruction": "…", "input": "…", "output": "…"}            input may be missing
    sharegpt            {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}
    text                {"text": "…"}

A row is taken as it is or refused with a reason; nothing is repaired. Keys that a format does not know are reported,
not used. The names are those of the field: OpenAI's chat rows, Stanford Alpaca, ShareGPT dumps.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lmtune.data.examples import ROLES, Message, Role

Format = Literal["prompt/completion", "messages", "alpaca", "sharegpt", "text"]

# In the order of their claim: Alpaca's own files carry a "text" column too, chat dumps often a "prompt".
_KEYS: dict[Format, tuple[tuple[str, ...], tuple[str, ...]]] = {  # required, optional
    "messages": (("messages",), ()),
    "sharegpt": (("conversations",), ()),
    "prompt/completion": (("prompt", "completion"), ()),
    "alpaca": (("instruction", "output"), ("input",)),
    "text": (("text",), ()),
}
KNOWN = (
    "a row has the keys prompt and completion, or messages, or instruction and output (alpaca), "
    "or conversations (sharegpt), or text"
)
_SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
}  # fmt: skip


class RowFault(Exception):
    """A row cannot be used; the text says why and what to do, the reader adds where."""


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
    for required, _ in _KEYS.values():
        found = [key for key in required if key in row]
        if found:
            missing = [key for key in required if key not in row]
            raise RowFault(f"{' and '.join(missing)} missing beside {' and '.join(found)}{_nearest(missing[0], row)}")
    if not row:
        raise RowFault(f"the row is empty; {KNOWN}")
    shown = ", ".join(quoted(key) for key in list(row)[:6]) + (", …" if len(row) > 6 else "")
    raise RowFault(f"unknown keys {shown}; {KNOWN}")


def parse_row(row: Mapping[str, Any], format: Format) -> ParsedRow:
    """The row's messages or text.

    Raises:
        RowFault: a value is missing, of the wrong type, empty where it is learned, or roles are out of order.
    """
    parsed = _PARSERS[format](row)
    required, optional = _KEYS[format]
    parsed.ignored_keys |= row.keys() - {*required, *optional}
    for message in parsed.messages:
        if message.role == "assistant" and not message.content.strip():
            parsed.warnings.append("an answer holds only white space")
        elif message.role == "user" and not message.content.strip():
            parsed.warnings.append("a question is empty")
    return parsed


def _prompt_completion(row: Mapping[str, Any]) -> ParsedRow:
    prompt, completion = _strings(row, "prompt", "completion", filled="completion")
    return ParsedRow(messages=(Message("user", prompt), Message("assistant", completion)))


def _alpaca(row: Mapping[str, Any]) -> ParsedRow:
    instruction, output = _strings(row, "instruction", "output", filled="output")
    more = row.get("input")
    if more is not None and more != "":  # exporters write a missing input as null
        (more,) = _strings(row, "input")
        instruction = f"{instruction}\n\n{more}"
    return ParsedRow(messages=(Message("user", instruction), Message("assistant", output)))


def _text(row: Mapping[str, Any]) -> ParsedRow:
    (text,) = _strings(row, "text", filled="text")
    warnings = [] if text.strip() else ["a text holds only white space"]
    return ParsedRow(text=text, warnings=warnings)


def _messages(row: Mapping[str, Any]) -> ParsedRow:
    return _turns(row["messages"], "messages", "role", "content", dict(zip(ROLES, ROLES, strict=True)))


def _sharegpt(row: Mapping[str, Any]) -> ParsedRow:
    return _turns(row["conversations"], "conversations", "from", "value", dict(_SHAREGPT_ROLES))


_PARSERS: dict[Format, Callable[[Mapping[str, Any]], ParsedRow]] = {
    "prompt/completion": _prompt_completion, "messages": _messages, "alpaca": _alpaca, "sharegpt": _sharegpt,
    "text": _text,
}  # fmt: skip


def _turns(turns: Any, key: str, role_key: str, content_key: str, roles: Mapping[str, Any]) -> ParsedRow:
    """The messages of a list of turns, each with its role known and its content a string."""
    if not isinstance(turns, list) or not turns:
        raise RowFault(f"{key} is {_kind(turns)}; it must be a list of turns")
    messages, ignored = [], set()
    for index, turn in enumerate(turns):
        where = f"{key}[{index}]"
        if not isinstance(turn, dict):
            raise RowFault(f"{where} is {_kind(turn)}; it must be an object with {role_key} and {content_key}")
        (role,) = _strings(turn, role_key, prefix=f"{where}.")
        if role not in roles:
            raise RowFault(f"{where}.{role_key} is {quoted(role)}; known: {', '.join(roles)}")
        filled = content_key if roles[role] == "assistant" else None
        (content,) = _strings(turn, content_key, prefix=f"{where}.", filled=filled)
        messages.append(Message(roles[role], content))
        ignored |= {f"{key}[].{name}" for name in turn.keys() - {role_key, content_key}}
    _check_order([message.role for message in messages], key)
    return ParsedRow(messages=tuple(messages), ignored_keys=frozenset(ignored))


def _check_order(roles: list[Role], key: str) -> None:
    """A system message only first; then user and assistant by turns, from a user to an assistant.

    Raises:
        RowFault: with the index where the order breaks.
    """
    first = 1 if roles[0] == "system" else 0
    for index, role in enumerate(roles[first:], start=first):
        wanted = "user" if (index - first) % 2 == 0 else "assistant"
        if role == "system":
            raise RowFault(f"{key}[{index}] is a system message; it may only stand first")
        if role != wanted:
            raise RowFault(f"{key}[{index}] is from {role} where {wanted}'s turn is; user and assistant alternate")
    if roles[-1] != "assistant":
        raise RowFault(f"{key} ends with {roles[-1]}; the last turn must be the assistant's, which is what is learned")


def _strings(row: Mapping[str, Any], *names: str, prefix: str = "", filled: str | None = None) -> list[str]:
    """The values of `names`, all strings of valid text, that of `filled` not empty; every problem at once."""
    problems = []
    for name in names:
        value = row.get(name)
        if name not in row:
            problems.append(f"{prefix}{name} is missing{_nearest(name, row)}")
        elif not isinstance(value, str):
            problems.append(f"{prefix}{name} is {_kind(value)}; it must be a string")
        elif name == filled and not value:
            problems.append(f"{prefix}{name} is empty; there is nothing to learn, remove the row")
        elif "\0" in value:
            problems.append(f"{prefix}{name} holds a NUL character (\\u0000); remove it")
        elif not _is_valid_unicode(value):
            problems.append(f"{prefix}{name} holds half a character (a lone surrogate such as \\ud83d); rewrite it")
    if problems:
        raise RowFault("; ".join(problems))
    return [row[name] for name in names]


def _is_valid_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"a number ({str(value)[:20]})"
    if isinstance(value, str):
        return f"a string ({quoted(value)})"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "an object"


def _nearest(name: str, row: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, row.keys(), n=1)
    return f"; is {quoted(near[0])} meant?" if near else ""


def quoted(text: str, longest: int = 40) -> str:
    """`text` in quotation marks, cut short; what a terminal cannot show, or would obey, is spelt out."""
    short = text if len(text) <= longest else text[: longest - 1] + "…"
    return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short) + '"'
