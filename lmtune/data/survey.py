"""What can be said of rows only when all are known: repeated rows, questions answered in several ways, lengths.

Each row leaves 28 bytes here, so ten million of them take 280 MB. Rows are compared by 64-bit hashes of their content.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lmtune.data.examples import Example, content_hash, prompt_hash

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_NUM_SHOWN = 5


@dataclass
class Tally:
    """How many rows something happened to, and the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str) -> None:
        """Count one row."""
        self.count += 1
        if len(self.first) < _NUM_SHOWN:
            self.first.append(where)

    def as_dict(self) -> dict[str, Any]:
        """`{"count", "first"}`."""
        return {"count": self.count, "first": list(self.first)}


def counted(count: int, name: str = "row") -> str:
    """`1 row`, `2,000 rows`."""
    return f"{count:,} {name}" + ("" if count == 1 else "s")


def shown_first(tally: Mapping[str, Any]) -> str:
    """The first rows of a tally's dict, and an ellipsis if there are more."""
    return ", ".join(tally["first"]) + (", …" if tally["count"] > len(tally["first"]) else "")


class Survey:
    """Collects rows one by one; the questions below are asked when all are in."""

    def __init__(self) -> None:
        self._content = array("Q")
        self._prompts = array("Q")
        self._lengths = array("I")
        self._lines = array("I")
        self._file_of = array("I")
        self._files: dict[str, int] = {}

    def add(self, example: Example) -> int:
        """Take one row in; returns the hash of its content."""
        row_hash = content_hash(example)
        self._content.append(row_hash)
        self._prompts.append(row_hash if example.text is not None else prompt_hash(example))
        self._lengths.append(min(example.num_characters, 2**32 - 1))
        self._lines.append(example.line)
        self._file_of.append(self._files.setdefault(example.source, len(self._files)))
        return row_hash

    def __len__(self) -> int:
        return len(self._content)

    @property
    def content(self) -> npt.NDArray[np.uint64]:
        """`[N]`, the hash of each row."""
        import numpy as np

        return np.frombuffer(self._content, dtype=np.uint64)

    def where(self, row: int) -> str:
        """`file:line` of a row."""
        return f"{list(self._files)[self._file_of[row]]}:{self._lines[row]}"

    def duplicates(self) -> Tally:
        """Rows that are equal to an earlier one."""
        import numpy as np

        first_of, again = _repeats(self.content)
        return self._tally(
            again, lambda k: f"{self.where(again[k])} (= {self.where(first_of[k])})", np.arange(len(again))
        )

    def same_prompt(self) -> Tally:
        """Rows whose prompt an earlier row answers differently."""
        import numpy as np

        prompts = np.frombuffer(self._prompts, dtype=np.uint64)
        _, unique_rows = np.unique(self.content, return_index=True)
        unique_rows.sort()
        first_of, again = _repeats(prompts[unique_rows])
        first_of, again = unique_rows[first_of], unique_rows[again]
        return self._tally(
            again, lambda k: f"{self.where(again[k])} (as {self.where(first_of[k])})", np.arange(len(again))
        )

    def shared_with(self, other: Survey) -> Tally:
        """Rows that `other` holds too."""
        import numpy as np

        shared = np.flatnonzero(np.isin(self.content, other.content))
        return self._tally(shared, self.where, shared)

    def characters(self) -> dict[str, int]:
        """Shortest, median, 95 % and longest row, in characters."""
        import numpy as np

        lengths = np.frombuffer(self._lengths, dtype=np.uint32)
        if not len(lengths):
            return {}
        found = np.quantile(lengths, [0, 0.5, 0.95, 1], method="nearest")
        return dict(zip(("shortest", "median", "95 %", "longest"), map(int, found), strict=True))

    def _tally(self, rows: Any, describe: Callable[[int], str], keys: Any) -> Tally:
        return Tally(len(rows), [describe(int(key)) for key in keys[:_NUM_SHOWN]])


def _repeats(hashes: npt.NDArray[np.uint64]) -> tuple[Any, Any]:
    """For each value that stands earlier already: where it first stood, and where it stands again; in order."""
    import numpy as np

    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    first_of = first[inverse]
    again = np.flatnonzero(first_of != np.arange(len(hashes)))
    return first_of[again], again
