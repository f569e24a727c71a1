"""What a step has found: how many rows, and three of them to look at."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from lmtune.data.prepare.rows import Row
from lmtune.data.values import quoted
from lmtune.io.text import pluralize

_SHOWN = 3
_AROUND = 24  # characters shown before the first difference
_LONGEST = 72


@dataclass
class Found:
    """The rows that a step changes or drops.

    Attributes:
        total: the rows that it has seen.
        examples: lines about the first three.
        kinds: how often each kind of thing was found, where a step tells several apart.
    """

    count: int = 0
    total: int = 0
    examples: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    def changed(self, before: Row, after: Row) -> None:
        """Count a row that is changed."""
        self.count += 1
        if len(self.examples) < _SHOWN:
            for (_, old), (_, new) in zip(before.texts(), after.texts(), strict=True):
                if old != new:
                    self.examples.append(f"{before.place}: {difference(old, new)}")
                    break

    def dropped(self, row: Row, why: str = "") -> None:
        """Count a row that is dropped; `why` says what is found in it."""
        self.count += 1
        if len(self.examples) < _SHOWN:
            text = row.joined("user", "assistant", "text") or row.joined()
            self.examples.append(f"{row.place}: {quoted(text, _LONGEST)}" + (f" ({why})" if why else ""))


def counted_rows(count: int, what: str) -> str:
    """`37 rows are equal …`, `1 row is equal …`."""
    verb, _, rest = what.partition(" ")
    if count == 1:
        verb = {"are": "is", "have": "has", "cannot": "cannot"}.get(verb, f"{verb}s")
        rest = rest.replace("near duplicates", "a near duplicate")
    return f"{pluralize(count)} {verb} {rest}"


def difference(old: str, new: str) -> str:
    """Both texts around the place where they begin to differ."""
    place = next((n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    start = max(0, place - _AROUND)
    before, after = (quoted("…" * (start > 0) + text[start:], _LONGEST) for text in (old, new))
    return f"{before} → {after}"
