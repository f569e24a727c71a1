"""The fate of every row, as it is written to a run's `data.json` and told to a person: nothing vanishes in silence."""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lmtune.data.types import Example, content_hash, prompt_hash
from lmtune.errors import CheckpointError
from lmtune.io.text import pluralize
from lmtune.runs.store import RunDirectory

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

WHY_DROPPED = {
    "too_long": "longer than data.max_length",
    "answer_too_long": "the answer alone is longer than data.max_length",
}


def describe_fates(fates: Mapping[str, Any]) -> str:
    """What became of the rows, in a few lines; `fates` as `load_data` or `tokenize` returns them."""
    if "rows" in fates:
        return "\n".join(_describe_part(fates))
    lines = _describe_part(fates["train"])
    validation = fates.get("validation") or {}
    if "rows" in validation:
        lines += ["validation:", *_describe_part(validation)]
        if validation["also_in_train"]["count"]:
            shared = validation["also_in_train"]
            lines.append(f"  warning: {pluralize(shared['count'])} of them also in train: {shown_first(shared)}")
    elif validation and validation["held_out"]:
        lines.append(f"  {pluralize(validation['held_out'])} of these held out for validation")
    elif validation:
        lines.append("  warning: nothing could be held out for validation; that needs two different rows")
    return "\n".join(lines)


def _describe_part(part: Mapping[str, Any]) -> list[str]:
    lines = [f"{name}: {format}" for name, format in part["formats"].items()][:10]
    if len(part["formats"]) > 10:
        lines.append(f"… and {len(part['formats']) - 10} more files")
    lines.append(
        f"  {pluralize(part['rows'])}, {part['kept']:,} kept: {part['tokens']:,} tokens, {part['trained_tokens']:,} of "
        f"them learned; the longest row has {part['longest_row_tokens']:,}"
    )
    lines += describe_faulty(part["faulty"]) if "faulty" in part else []
    for reason, tally in part["dropped"].items():
        lines.append(f"  {tally['count']:,} dropped, {WHY_DROPPED.get(reason, reason)}: {shown_first(tally)}")
    if part["truncated"]["count"]:
        lines.append(f"  {part['truncated']['count']:,} cut at their beginning: {shown_first(part['truncated'])}")
    if part["duplicates"]["count"]:
        lines.append(f"  {part['duplicates']['count']:,} repeat an earlier row: {shown_first(part['duplicates'])}")
    lines += [f"  warning: {warning}" for warning in part["warnings"]]
    return lines


def changed_files(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which data files differ in content between two runs' fates, as `section.key: what`; a new name is no difference.

    Args:
        before: of the run as it was begun, from its `data.json`; what cannot be understood of it is passed over.
        now: of the run as it would go on.
    """
    lines = []
    for part in ("train", "validation"):
        old, new = _contents(before.get(part)), _contents(now.get(part))
        if isinstance(old, dict) and isinstance(new, dict):
            lines += [f"data.{part}: {what}" for what in [_difference(old, new)] if what]
        elif old is not None and new is not None and old != new:
            lines.append(f"data.{part}: was {_named(old)}, now {_named(new)}")
    return lines


def _contents(part: Any) -> dict[str, str] | str | None:
    """Hash by file name, or what there is in place of files, or None for what cannot be understood."""
    if not part:
        return "none" if part is None else None
    if not isinstance(part, dict):
        return None
    if "held_out" in part:
        return "a part of data.train"
    files, sums = part.get("files"), part.get("sha256")
    if not isinstance(files, list) or not isinstance(sums, list) or len(files) != len(sums):
        return None
    return {str(name): str(digest) for name, digest in zip(files, sums, strict=True)}


def _difference(old: dict[str, str], new: dict[str, str]) -> str:
    """What became of the files, by content; empty if nothing."""
    changed = [name for name in new if name in old and new[name] != old[name]]
    added, gone = [name for name in new if name not in old], [name for name in old if name not in new]
    if sorted(old.values()) == sorted(new.values()):  # at most renamed
        return "" if list(old.values()) == list(new.values()) else "the same files in another order"
    parts = [(changed, "changed"), (added, "is new"), (gone, "is gone")]
    return ", ".join(f"{_some(names)} {what}" for names, what in parts if names)


def _named(contents: dict[str, str] | str) -> str:
    return contents if isinstance(contents, str) else _some(list(contents))


def _some(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


_NUM_SHOWN = 5
_MAX_REASONS = 20  # of faulty rows that are told apart
_PIECE_ROWS = 8192  # looked at together


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


class FaultyRows:
    """Rows that were left out, counted by reason; reasons that differ only in numbers and quotations are one."""

    def __init__(self) -> None:
        self.count = 0
        self._tallies: dict[str, tuple[str, Tally]] = {}  # kind of reason -> the first of its kind, the rows

    def add(self, reason: str, where: str) -> None:
        """Count one row."""
        self.count += 1
        kind = re.sub(r'"[^"]*"|\d[\d,.]*', "…", reason)
        if kind not in self._tallies and len(self._tallies) >= _MAX_REASONS:
            kind = reason = "other reasons"
        self._tallies.setdefault(kind, (reason, Tally()))[1].add(where)

    def as_dict(self) -> dict[str, Any]:
        """`{"count", "reasons": [{"reason", "count", "first"}]}`."""
        reasons = [{"reason": reason, **tally.as_dict()} for reason, tally in self._tallies.values()]
        return {"count": self.count, "reasons": reasons}


def describe_faulty(faulty: Mapping[str, Any]) -> list[str]:
    """How many rows were left out as faulty, and a line for each reason; `faulty` as `FaultyRows.as_dict` gives it."""
    if not faulty["count"]:
        return []
    lines = [f"  warning: {pluralize(faulty['count'], 'faulty row')} left out (data.faulty_rows: skip):"]
    return lines + [
        f"    {reason['count']:,}: {reason['reason']}: {shown_first(reason)}" for reason in faulty["reasons"]
    ]


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
        firsts = _Firsts(self.content)
        tally = Tally(len(self) - firsts.num_different)
        for start in range(0, len(self), _PIECE_ROWS):
            if len(tally.first) >= min(_NUM_SHOWN, tally.count):
                break
            rows, first = firsts.next_rows(start)
            again = rows[first != rows]
            self._show(tally, again, first[again - start], "=")
        return tally

    def same_prompt(self) -> Tally:
        """Rows whose prompt an earlier row answers differently."""
        import numpy as np

        contents, prompts = _Firsts(self.content), _Firsts(np.frombuffer(self._prompts, dtype=np.uint64))
        tally = Tally(contents.num_different - prompts.num_different)  # equal rows have equal prompts
        for start in range(0, len(self), _PIECE_ROWS):
            if len(tally.first) >= min(_NUM_SHOWN, tally.count):
                break
            rows, first_content = contents.next_rows(start)
            _, first_prompt = prompts.next_rows(start)
            again = rows[(first_content == rows) & (first_prompt != rows)]
            self._show(tally, again, first_prompt[again - start], "as")
        return tally

    def shared_with(self, other: Survey) -> Tally:
        """Rows that `other` holds too."""
        import numpy as np

        known, tally = np.sort(other.content), Tally()
        for start in range(0, len(self), _PIECE_ROWS):
            piece = self.content[start : start + _PIECE_ROWS]
            shared = np.flatnonzero(_place_in(known, piece)[1]) + start
            tally.first += [self.where(int(row)) for row in shared[: _NUM_SHOWN - len(tally.first)]]
            tally.count += len(shared)
        return tally

    def characters(self) -> dict[str, int]:
        """Shortest, median, 95 % and longest row, in characters."""
        import numpy as np

        lengths = np.frombuffer(self._lengths, dtype=np.uint32)
        if not len(lengths):
            return {}
        found = np.quantile(lengths, [0, 0.5, 0.95, 1], method="nearest")
        return dict(zip(("shortest", "median", "95 %", "longest"), map(int, found), strict=True))

    def _show(self, tally: Tally, rows: Any, first: Any, word: str) -> None:
        """Name some rows, each with the row where the same stands first, as far as there is room."""
        for row, earlier in list(zip(rows, first, strict=True))[: _NUM_SHOWN - len(tally.first)]:
            tally.first.append(f"{self.where(int(row))} ({word} {self.where(int(earlier))})")


class _Firsts:
    """In which row each hash stands first. Only of those that stand more than once a row is kept.

    Attributes:
        num_different: hashes that differ from all others.
    """

    def __init__(self, hashes: npt.NDArray[np.uint64]) -> None:
        import numpy as np

        self._hashes = hashes
        ordered = np.sort(hashes)
        same = ordered[1:] == ordered[:-1]
        self.num_different = len(hashes) - int(np.count_nonzero(same))
        again = ordered[1:][same]
        del ordered, same
        self._values = again[np.flatnonzero(np.diff(again, prepend=~again[:1]))]
        self._rows = np.full(len(self._values), -1, dtype=np.int64)

    def next_rows(self, start: int) -> tuple[Any, Any]:
        """The numbers of the rows from `start` on, and where the hash of each stands first; to be asked in order."""
        import numpy as np

        piece = self._hashes[start : start + _PIECE_ROWS]
        rows = np.arange(start, start + len(piece))
        place, found = _place_in(self._values, piece)
        place, first = place[found], rows.copy()
        new, index = np.unique(place, return_index=True)
        unknown = self._rows[new] < 0
        self._rows[new[unknown]] = rows[found][index[unknown]]
        first[found] = self._rows[place]
        return rows, first


def _place_in(ordered: npt.NDArray[np.uint64], hashes: npt.NDArray[np.uint64]) -> tuple[Any, Any]:
    """Where each of `hashes` stands in `ordered`, and whether it does."""
    import numpy as np

    place = np.searchsorted(ordered, hashes)
    found = np.zeros(len(hashes), dtype=bool)
    inside = place < len(ordered)
    found[inside] = ordered[place[inside]] == hashes[inside]
    return place, found


def describe_rows(run: RunDirectory) -> str:
    """What became of the rows of data, in a few lines; nothing if that was not written yet.

    Raises:
        CheckpointError: `data.json` is damaged.
    """
    from lmtune.data.report import describe_fates

    fates = run.read_json(run.data)
    try:
        return describe_fates(fates) if fates else ""
    except (KeyError, TypeError, AttributeError, ValueError):
        raise CheckpointError(f"{run.data}: damaged: no counts of rows; delete it or restore it") from None
