"""JSON read strictly: what the standard `json` module lets pass in silence, a key given twice or NaN, is a fault here.

Every fault says the column and what is wrong there in words that need no knowledge of parsers. Nothing is converted: a
string that looks like a date stays a string.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from lmtune.data.values import RowFault, quoted

MAX_DEPTH = 100  # of brackets in a row; how deep Python itself can go differs from version to version
_GAP = re.compile(r"[ \t\r\n]*")
_TOO_DEEP = "brackets are nested too deep; a row is a flat object"


class Broken(RowFault):
    """The value is no JSON, so that its end is not known; `position` is where in the text."""

    def __init__(self, reason: str, position: int) -> None:
        super().__init__(reason)
        self.position = position


class Unfinished(Broken):
    """The text ended before the value did."""


class StrictDecoder:
    """`json`, with what it passes in silence as faults: a key given twice, NaN and Infinity."""

    def __init__(self) -> None:
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)
        self._problems: list[str] = []  # of the value being decoded

    def value_at(self, text: str, start: int, first_column: int = 1) -> tuple[Any, int]:
        """The value that begins at `start`, or the fault in it, and where it ends; the text begins in `first_column`.

        Raises:
            Unfinished: the text ends first.
            Broken: the value is no JSON.
        """
        self._problems.clear()
        try:
            value, end = self._decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            newline = text.rfind("\n", 0, error.pos)
            column = error.pos - newline if newline >= 0 else error.pos + first_column
            unfinished = error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip())
            kind = Unfinished if unfinished else Broken
            raise kind(f"column {column}: {_in_words(error, text)}", error.pos) from None
        except RecursionError:
            raise Broken(_TOO_DEEP, start) from None
        except ValueError as error:  # an integer of thousands of digits
            raise Broken(f"not readable: {error}", start) from None
        if text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH and _is_deep(value):
            self._problems.append(_TOO_DEEP)
        return RowFault("; ".join(self._problems)) if self._problems else value, end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            self._problems.append(f"the key {quoted(twice)} stands twice in one object; keep one")
        return found

    def _constant(self, name: str) -> None:
        self._problems.append(f"{name} is not JSON; write null or a number")


def _is_deep(value: Any) -> bool:
    """Whether `value` is nested deeper than `MAX_DEPTH`."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return any(isinstance(value, (dict, list)) for value in level)


def decode_json(text: str) -> Any:
    """The one JSON value in `text`.

    Raises:
        RowFault: with the column and what is wrong there.
    """
    value, end = StrictDecoder().value_at(text, end_of_gap(text, 0))
    end = end_of_gap(text, end)
    if end != len(text):
        raise RowFault(f"column {end + 1}: more text after the row's end ({excerpt(text, end)}); write one row a line")
    if isinstance(value, RowFault):
        raise value
    return value


def end_of_gap(text: str, position: int) -> int:
    match = _GAP.match(text, position)
    assert match is not None
    return match.end()


def _in_words(error: json.JSONDecodeError, text: str) -> str:
    found = text[error.pos : error.pos + 1]
    if error.msg.startswith("Unterminated string"):
        return "a string is not closed; a quotation mark is missing"
    if error.msg.startswith("Invalid control character"):
        return f"a raw control character (0x{ord(found):02x}) in a string; write it as \\n, \\t or \\u{ord(found):04x}"
    if not text[: error.pos].strip() and found not in ("", "'"):
        return f"this is not JSON ({excerpt(text, error.pos)}); a row is an object like {{…}}"
    if found == "'":
        return f"single quotes ({excerpt(text, error.pos)}); JSON wants double quotes"
    what = error.msg[0].lower() + error.msg[1:]
    return f"{what}{f', found {excerpt(text, error.pos)}' if found else ', found the end'}"


def excerpt(text: str, position: int) -> str:
    return quoted(text[position : position + 21], 20)
