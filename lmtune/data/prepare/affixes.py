"""What most questions or answers begin or end with: marks that a chat template makes needless.

    "Q: Do you ship abroad?\n\n###\n\n"    →  "Do you ship abroad?"
    " Answer: Yes. END"                    →  "Yes."

Only marks are taken off: the name of a speaker, or signs and stop words. That all questions begin with "What is" is no
mark.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from typing import Literal

from lmtune.data.prepare.rows import Row
from lmtune.data.prepare.spool import Spool

_SHARE = 0.95
_SAMPLE = 2000  # rows that a candidate is read from
_LEAST_ROWS = 4
_BEGINNING = re.compile(
    r"\s*(?:(?:q|a|question|answer|prompt|completion|user|human|assistant|ai|bot|input|output|response|instruction|"
    r"问|答|问题|回答|用户|助手)\s*[:：]|[-=#>*|]{2,}|#+(?=\s)|>)\s*",
    re.IGNORECASE,
)
_END = re.compile(
    r"\s*(?:#{2,}|[-=]{2,}>?|[-=]>|(?<=\s)(?:END|STOP|EOS)|<\|[\w ]+\|>|</s>|"
    r"(?:a|answer|assistant|ai|bot|答|回答|助手)\s*[:：])\s*\Z",
    re.IGNORECASE,
)
Side = Literal["beginning", "end"]


def common_marks(spool: Spool, side: Side) -> dict[str, str]:
    """The mark that 95 % of the texts of a role begin or end with, by role."""
    texts: dict[str, list[str]] = {}
    for row in islice(spool, _SAMPLE):
        for role, text in row.texts():
            texts.setdefault(role, []).append(text)
    return {
        role: mark for role, some in texts.items()
        if role in ("user", "assistant") and len(some) >= _LEAST_ROWS and (mark := _mark(some, side))
    }  # fmt: skip


def _mark(texts: Sequence[str], side: Side) -> str:
    if side == "beginning":
        common = _common(texts)
        found = _BEGINNING.match(common)
        return found[0] if found and len(found[0].strip()) else ""
    common = _common([text[::-1] for text in texts])[::-1]
    end = _END.search(common)
    return end[0] if end else ""


def _common(texts: Sequence[str]) -> str:
    """The longest text that 95 % of `texts` begin with: these stand next to each other when sorted."""
    ordered = sorted(texts)
    width = max(2, round(_SHARE * len(ordered)))
    found = [_shared(ordered[start], ordered[start + width - 1]) for start in range(len(ordered) - width + 1)]
    return max(found, key=len)


def _shared(one: str, other: str) -> str:
    count = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:count]


def without_marks(row: Row, marks: dict[str, str], side: Side) -> Row:
    """The row without the marks of its texts, by role."""

    def change(role: str, text: str) -> str:
        mark = marks.get(role, "")
        return text.removeprefix(mark) if side == "beginning" else text.removesuffix(mark)

    return row.with_texts(change)
