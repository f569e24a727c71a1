"""Single values of a row: whether each is what its key must hold, and how a message names it."""

from __future__ import annotations

import difflib
import functools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any


class RowFault(Exception):
    """A row cannot be used; the text says why and what to do, the reader adds where.

    Args:
        reason: what is wrong, and what is expected.
        remedy: what whoever has the file can do; it concerns no request of a client.
        once: faults of this name are told once a file.
        ends_file: the rest of the file cannot be read either, so no skipping of rows helps.
    """

    def __init__(self, reason: str, remedy: str = "", once: str | None = None, ends_file: bool = False) -> None:
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.reason = reason
        self.once = once
        self.ends_file = ends_file


def strings(row: Mapping[str, Any], *names: str, prefix: str = "", filled: str | None = None) -> list[str]:
    """The values of `names`, which must be strings of valid text, that of `filled` not empty.

    Raises:
        RowFault: with every problem at once.
    """
    problems, remedy = list[str](), ""
    for name in names:
        if name not in row:
            problems.append(f"{prefix}{name} is missing{nearest(name, row)}")
        elif problem := _text_problem(row[name]):
            problems.append(f"{prefix}{name} {problem}")
        elif name == filled and not row[name]:
            problems.append(f"{prefix}{name} is empty")
            remedy = "there is nothing to train on, remove the row"
    if problems:
        raise RowFault("; ".join(problems), remedy)
    return [row[name] for name in names]


def _text_problem(value: Any) -> str | None:
    if not isinstance(value, str):
        return f"is {kind_of(value)}; it must be a string"
    if "\0" in value:
        return "contains a NUL character (\\u0000); remove it"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "contains an unpaired surrogate (such as \\ud83d); rewrite it"
    return None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no key stands twice: one of the two values would be lost."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RowFault(f"the key {quoted(twice)} stands twice in one object; keep one")
    return made


def is_filled(value: Any) -> bool:
    """Whether a key says anything: exporters write null, "", [] or "[]" for what is not there."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    return value is not None and value is not False and value != [] and value != {}


@functools.lru_cache(maxsize=4096)
def plain(name: str) -> str:
    """A key without what only spells it differently: `systemPrompt`, `System_Prompt`, `system-prompt`."""
    return "".join(name.split()).replace("_", "").replace("-", "").casefold()


def plain_table(*rows: tuple[Iterable[str], str]) -> dict[str, str]:
    """One value for each of several keys, by their plain spelling."""
    return {plain(key): value for keys, value in rows for key in keys}


def key_problems(
    keys: Mapping[str, Any], known: Collection[str], refused: Mapping[str, str], prefix: str = ""
) -> list[str]:
    """What keys that are not `known` would lose: other spellings of known ones, and those that are `refused`."""
    own = {plain(key): key for key in known}
    problems = []
    for key in sorted(keys.keys() - set(known)):
        if (name := plain(key)) in own and keys[key] is not None:
            problems.append(f"{prefix}{key} is used only as {own[name]}; rename it, or remove the key")
        elif name in refused and is_filled(keys[key]):
            problems.append(f"{prefix}{key}: {refused[name]}")
    return problems


def kind_of(value: Any) -> str:
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


def nearest(name: str, row: Mapping[str, Any]) -> str:
    """A question after the key that was probably meant by `name`, or nothing."""
    near = difflib.get_close_matches(name, row.keys(), n=1)
    return f"; is {quoted(near[0])} meant?" if near else ""


def quoted(text: str, longest: int = 40) -> str:
    """`text` in quotation marks, cut short; what a terminal cannot show, or would obey, is spelt out."""
    short = text if len(text) <= longest else text[: longest - 1] + "…"
    return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short) + '"'


def listed_keys(keys: Iterable[str], most: int = 6) -> str:
    """The first `most` keys, quoted."""
    keys = list(keys)
    return ", ".join(quoted(key) for key in keys[:most]) + (", …" if len(keys) > most else "")
