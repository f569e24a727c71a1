"""What became of every row: typed counts that a run keeps as `data.json` and shows to a person.

`DuplicateIndex` finds equal rows and equal prompts by 64-bit hashes, in under 60 bytes a row.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from lmtune.data.lengths import WHY_DROPPED
from lmtune.data.types import OUTCOMES, Example, Label, RowKind, content_hash, prompt_hash
from lmtune.data.values import quoted
from lmtune.io.text import pluralize

if TYPE_CHECKING:  # NumPy is imported once all rows are read, so that `lmtune check` answers faults at once
    import numpy as np
    import numpy.typing as npt

T = TypeVar("T")
_MAX_LOCATIONS = 5
_MAX_FILES = 10
_MAX_REASONS = 20
_MAX_LABELS = 1000  # different ones that are counted
_MAX_CLASSES = 20  # different numbers; more are quantities
_SHOWN_LABELS = 10
_NAMES: dict[RowKind, str] = {"answer": "row", "pair": "pair", "judged": "judged answer", "labelled": "labelled row"}


@dataclass
class RowCounter:
    """A number of rows, and the locations of the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, location: str) -> None:
        """Count one row."""
        self.count += 1
        if len(self.first) < _MAX_LOCATIONS:
            self.first.append(location)

    @property
    def examples(self) -> str:
        """`a.jsonl:3, a.jsonl:9, …`."""
        return ", ".join(self.first) + (", …" if self.count > len(self.first) else "")


@dataclass
class FaultyReason(RowCounter):
    """The faulty rows of one reason."""

    reason: str = ""


@dataclass
class FaultyRows:
    """Rows that `data.faulty_rows: skip` leaves out. Reasons that differ only in numbers and quotations are one."""

    count: int = 0
    reasons: list[FaultyReason] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reason_of_kind: dict[str, FaultyReason] = {}

    def add(self, reason: str, location: str) -> None:
        """Count one row."""
        self.count += 1
        kind = re.sub(r'"[^"]*"|\d[\d,.]*', "…", reason)
        if kind not in self._reason_of_kind and len(self.reasons) >= _MAX_REASONS:
            kind = reason = "other reasons"
        if kind not in self._reason_of_kind:
            self._reason_of_kind[kind] = FaultyReason(reason=reason)
            self.reasons.append(self._reason_of_kind[kind])
        self._reason_of_kind[kind].add(location)

    def describe(self) -> list[str]:
        """A line with the count and a line for each reason; nothing if there are no faulty rows."""
        if not self.count:
            return []
        lines = [f"  warning: {pluralize(self.count, 'faulty row')} left out (data.faulty_rows: skip):"]
        return lines + [f"    {found.count:,}: {found.reason}: {found.examples}" for found in self.reasons]


def label_name(label: Label) -> str:
    """A label as JSON, a text without quotation marks; what a terminal cannot show is spelt out."""
    return quoted(label)[1:-1] if isinstance(label, str) else json.dumps(label, ensure_ascii=False)


@dataclass
class LabelCounts:
    """How often each label occurs.

    Attributes:
        counts: by name; of a row with several labels each counts.
        least, greatest, mean: of those that are numbers.
        num_empty: rows with an empty list, of which no label holds.
    """

    counts: dict[str, int] = field(default_factory=dict)
    num_empty: int = 0
    num_numbers: int = 0
    least: float | None = None
    greatest: float | None = None
    mean: float | None = None

    def add(self, label: Label) -> None:
        """Count the label of one row."""
        self.num_empty += label == ()
        if isinstance(label, (int, float)) and not isinstance(label, bool):
            self.num_numbers += 1
            self.least = label if self.least is None else min(self.least, label)
            self.greatest = label if self.greatest is None else max(self.greatest, label)
            before = self.mean or 0.0
            self.mean = before + (label - before) / self.num_numbers
        for name in map(label_name, label if isinstance(label, tuple) else (label,)):
            if name in self.counts or len(self.counts) < _MAX_LABELS:
                self.counts[name] = self.counts.get(name, 0) + 1

    def describe(self) -> list[str]:
        """A line, or nothing where there are no labels."""
        if self.num_numbers and len(self.counts) > _MAX_CLASSES:
            return [f"  labels: numbers from {self.least:g} to {self.greatest:g}, mean {self.mean:.4g}"]
        if not self.counts:
            return []
        none = f"; {pluralize(self.num_empty)} with none of them" if self.num_empty else ""
        often = sorted(self.counts.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {count:,}" for name, count in often[:_SHOWN_LABELS])
        more = f" and {len(often) - _SHOWN_LABELS} more" if len(often) > _SHOWN_LABELS else ""
        return [f"  {pluralize(len(often), 'label')}: {shown}{more}{none}"]


@dataclass(kw_only=True)
class ContentReport:
    """What the rows of some files hold, whatever model reads them.

    Attributes:
        kind: of the rows.
        labels: of judged and labelled rows.
        zero_weight: rows of weight 0, which are left out.
        total_weight: of the rows that are used; their number, if no row has a weight.
        turns: rows by what was done with their turns, or is worth knowing of them, a key of `OUTCOMES`.
        formats: the row format of each file, by the file's name.
        read_as: what was found out about a file: its delimiter, its encoding, which columns became which keys.
        duplicates: rows equal to an earlier row.
        same_prompt: rows with the prompt of an earlier row and another answer.
        faulty: rows left out because they cannot be used.
    """

    kind: RowKind = "answer"
    labels: LabelCounts = field(default_factory=LabelCounts)
    zero_weight: RowCounter = field(default_factory=RowCounter)
    total_weight: float = 0.0
    turns: dict[str, RowCounter] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)
    read_as: dict[str, str] = field(default_factory=dict)
    duplicates: RowCounter = field(default_factory=RowCounter)
    same_prompt: RowCounter = field(default_factory=RowCounter)
    faulty: FaultyRows = field(default_factory=FaultyRows)
    warnings: list[str] = field(default_factory=list)

    def add(self, example: Example) -> None:
        """Count the label, the weight and the turns of a row that is used."""
        self.kind = example.kind
        for outcome in example.outcomes:
            self.turns.setdefault(outcome, RowCounter()).add(example.location)
        self.total_weight += example.weight
        if example.label is not None:
            self.labels.add(example.label)

    def without_zero_weights(self, examples: Iterable[Example]) -> Iterator[Example]:
        """Those that count; the others are counted here."""
        for example in examples:
            if example.weight:
                yield example
            else:
                self.zero_weight.add(example.location)

    def describe_turns(self) -> list[str]:
        """A line for each of `turns`."""
        return [
            f"  {pluralize(self.turns[name].count)} {words}: {self.turns[name].examples}"
            for name, words in OUTCOMES.items()
            if name in self.turns
        ]

    def format_of(self, name: str) -> str:
        """The format of a file, and how it is written: `prompt/completion (delimiter ";")`."""
        return self.formats[name] + (f" ({self.read_as[name]})" if name in self.read_as else "")

    def describe_weights(self, num_used: int) -> list[str]:
        """The lines about labels and weights."""
        lines = self.labels.describe()
        if self.zero_weight.count:
            lines.append(f"  {self.zero_weight.count:,} left out, weight 0: {self.zero_weight.examples}")
        if self.total_weight != num_used:
            lines.append(f"  the weights of the {pluralize(num_used)} used sum to {self.total_weight:,.6g}")
        return lines


@dataclass(kw_only=True)
class PartReport(ContentReport):
    """What became of the rows of one part of the data, training or validation.

    Attributes:
        files, sha256: names and hashes of the files.
        rows: rows read, faulty ones included; `kept` of them are used.
        dropped: rows left out by `data.max_length`, by a key of `WHY_DROPPED`.
        truncated: rows whose beginning is cut off.
        split: plain texts that are split, together into `pieces`.
        tokens, trained_tokens: of the rows kept.
        longest_row_tokens: of a sequence, before rows are dropped or truncated.
        also_in_train: validation rows that are training rows too.
    """

    files: list[str]
    sha256: list[str]
    rows: int = 0
    kept: int = 0
    dropped: dict[str, RowCounter] = field(default_factory=dict)
    truncated: RowCounter = field(default_factory=RowCounter)
    split: RowCounter = field(default_factory=RowCounter)
    pieces: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest_row_tokens: int = 0
    also_in_train: RowCounter | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return asdict(self, dict_factory=_without_missing)


@dataclass(frozen=True)
class SourceReport:
    """What of one of several sources is trained on.

    Attributes:
        path, split, share: as the config has them.
        rows: to train on.
        examples_per_epoch: how many of them an epoch takes.
    """

    path: str
    rows: int
    examples_per_epoch: int
    split: str | None = None
    share: float | None = None

    def describe(self) -> str:
        """A line."""
        name = self.path + (f", split {self.split}" if self.split else "")
        return f"  {name}: {self.examples_per_epoch:,} of {pluralize(self.rows)} in each epoch"


@dataclass(frozen=True)
class HeldOut:
    """Validation rows that are held out of the training files; `copies` of them are neither trained nor scored."""

    held_out: int
    copies: int = 0


@dataclass(frozen=True)
class SelectedRows:
    """How many rows a `Selection` trains on, and how many different ones these are."""

    rows: int
    different: int


@dataclass(frozen=True)
class DataReport:
    """What became of every row of a run.

    Attributes:
        template: how rows become tokens, in words.
        validation: None if `data.validation_fraction` is 0.
        rendered_at: the time that the template writes into prompts, if it writes one.
        sources: of the training rows, where several are given.
        selected: of the training rows, where not the settings alone say which are used.
    """

    template: str
    train: PartReport
    validation: PartReport | HeldOut | None
    rendered_at: str | None = None
    sources: list[SourceReport] | None = None
    selected: SelectedRows | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as `data.json` holds it."""
        return asdict(self, dict_factory=_without_missing)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> DataReport:
        """The inverse of `to_dict`; ValueError if the tree is not such a report."""
        return typed(cls, tree)


def typed(cls: type[T], tree: Mapping[str, Any]) -> T:
    """A dataclass from its JSON tree; keys of other versions are ignored. ValueError if it is damaged."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls).validate_python(tree)


def _without_missing(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """`data.json` writes `validation: null`, and no other key without a value."""
    return {key: value for key, value in items if value is not None or key == "validation"}


def describe_report(report: DataReport) -> str:
    """What became of the rows, in a few lines."""
    lines = describe_part(report.train)
    if (selected := report.selected) is not None:
        repeated = f", {selected.different:,} different ones" if selected.different < selected.rows else ""
        lines.append(f"  {pluralize(selected.rows)} of these selected to train on{repeated} (selection.json)")
    validation = report.validation
    if isinstance(validation, PartReport):
        lines += ["validation:", *describe_part(validation)]
    elif validation is not None and validation.held_out:
        copies = f"; {validation.copies:,} augmented copies of them are not used" if validation.copies else ""
        held = f"{validation.held_out:,} rows and pieces" if report.train.pieces else pluralize(validation.held_out)
        lines.append(f"  {held} of these held out for validation{copies}")
    elif validation is not None:
        lines.append("  warning: no validation rows: a part can be held out only of two or more different rows")
    if any(source.share is not None for source in report.sources or ()):
        total = sum(source.examples_per_epoch for source in report.sources or ())
        lines.append(f"an epoch has {total:,} examples, in which the shares hold and no row stands twice:")
        lines += [source.describe() for source in report.sources or ()]
    return "\n".join(lines)


def describe_part(part: PartReport) -> list[str]:
    """The lines about one part."""
    lines = describe_files([f"{name}: {part.format_of(name)}" for name in part.formats])
    trained = "" if part.kind == "labelled" else f", {part.trained_tokens:,} of them trained"
    lines.append(
        f"  {pluralize(part.rows, _NAMES[part.kind])}, {part.kept:,} kept: {part.tokens:,} tokens{trained}; "
        f"the longest row has {part.longest_row_tokens:,}"
    )
    lines += [*part.describe_turns(), *part.describe_weights(part.kept), *part.faulty.describe()]
    for reason, rows in part.dropped.items():
        lines.append(f"  {rows.count:,} dropped, {WHY_DROPPED.get(reason, reason)}: {rows.examples}")
    if part.truncated.count:
        lines.append(f"  {part.truncated.count:,} left-truncated: {part.truncated.examples}")
    if part.split.count:
        lines.append(f"  {part.split.count:,} split into {part.pieces:,} pieces: {part.split.examples}")
    if part.duplicates.count:
        lines.append(f"  {part.duplicates.count:,} repeat an earlier row: {part.duplicates.examples}")
    lines += [f"  warning: {warning}" for warning in part.warnings]
    return lines + (describe_shared(part.also_in_train) if part.also_in_train else [])


def describe_files(lines: Sequence[str]) -> list[str]:
    """The first ten lines, one a file, and how many more there are."""
    more = len(lines) - _MAX_FILES
    return [*lines[:_MAX_FILES], *([f"… and {more} more files"] if more > 0 else [])]


def describe_shared(rows: RowCounter) -> list[str]:
    """A warning about validation rows that are training rows too."""
    return [f"  warning: {pluralize(rows.count)} also in train: {rows.examples}"] if rows.count else []


def changed_files(before: DataReport, now: DataReport) -> list[str]:
    """Which data files differ in content between two starts of a run, as `section.key: what`; names may differ."""
    lines = []
    for name in ("train", "validation"):
        old, new = _contents(getattr(before, name)), _contents(getattr(now, name))
        if list(old.values()) == list(new.values()):  # at most renamed
            continue
        changes = [
            ([file for file in new if old.get(file, new[file]) != new[file]], "changed"),
            ([file for file in new if file not in old], "is new"),
            ([file for file in old if file not in new], "is gone"),
        ]
        found = [f"{', '.join(files)} {what}" for files, what in changes if files]
        lines.append(f"data.{name}: {', '.join(found) or 'the same files in another order'}")
    return lines


def _contents(part: PartReport | HeldOut | None) -> dict[str, str]:
    """Hash by file name."""
    if isinstance(part, PartReport):
        return dict(zip(part.files, part.sha256, strict=False))
    return {} if part is None else {"a part of data.train": ""}


class DuplicateIndex:
    """Collects rows one by one, 28 bytes each, then finds equal ones by sorting their hashes."""

    def __init__(self) -> None:
        self._contents = array("Q")
        self._prompts = array("Q")
        self._lengths = array("I")
        self._lines = array("I")
        self._file_of = array("I")
        self._files: dict[tuple[str, str], int] = {}

    def add(self, example: Example) -> tuple[int, int]:
        """Take one row; returns the hashes of its content and its prompt."""
        hashes = content_hash(example), prompt_hash(example)
        self._contents.append(hashes[0])
        self._prompts.append(hashes[1])
        self._lengths.append(min(example.num_characters, 2**32 - 1))
        self._lines.append(example.line)
        self._file_of.append(self._files.setdefault((example.source, example.mark), len(self._files)))
        return hashes

    def __len__(self) -> int:
        return len(self._contents)

    def location(self, row: int) -> str:
        """`file:line` of a row."""
        return "".join(list(self._files)[self._file_of[row]]) + str(self._lines[row])

    def duplicates(self) -> RowCounter:
        """Rows that are equal to an earlier one."""
        import numpy as np

        first = _first_rows(self._contents)
        return self._counter(np.flatnonzero(first != np.arange(len(first))), first, "=")

    def same_prompt(self) -> RowCounter:
        """Rows whose prompt an earlier row answers differently."""
        import numpy as np

        first = _first_rows(self._prompts)
        is_new_content = _first_rows(self._contents) == np.arange(len(first))
        return self._counter(np.flatnonzero(is_new_content & (first != np.arange(len(first)))), first, "as")

    def shared_with(self, other: DuplicateIndex) -> RowCounter:
        """Rows that `other` holds too."""
        import numpy as np

        known, own = np.sort(np.frombuffer(other._contents, np.uint64)), np.frombuffer(self._contents, np.uint64)
        place = np.searchsorted(known, own)
        place[place == len(known)] = 0
        rows = np.flatnonzero(known[place] == own) if len(known) else np.arange(0)
        return RowCounter(len(rows), [self.location(int(row)) for row in rows[:_MAX_LOCATIONS]])

    def characters(self) -> dict[str, int]:
        """Shortest, median, 95 % and longest row, in characters."""
        import numpy as np

        if not self._lengths:
            return {}
        found = np.quantile(np.frombuffer(self._lengths, np.uint32), [0, 0.5, 0.95, 1], method="nearest")
        return dict(zip(("shortest", "median", "95 %", "longest"), map(int, found), strict=True))

    def _counter(self, rows: npt.NDArray[np.int64], first: npt.NDArray[np.int32], word: str) -> RowCounter:
        """`rows`, the first of them named together with the row where the same stands first."""
        pairs = [(row, int(first[row])) for row in rows[:_MAX_LOCATIONS].tolist()]
        return RowCounter(len(rows), [f"{self.location(a)} ({word} {self.location(b)})" for a, b in pairs])


def _first_rows(hashes: array[int]) -> npt.NDArray[np.int32]:
    """int32 `[N]`: for each row the first row with the same hash."""
    import numpy as np

    values = np.frombuffer(hashes, dtype=np.uint64)
    order = np.argsort(values, kind="stable").astype(np.int32)
    ordered = values[order]
    start = np.arange(len(values), dtype=np.int32)  # of the group of equal hashes, as a place in `ordered`
    start[1:][ordered[1:] == ordered[:-1]] = 0
    np.maximum.accumulate(start, out=start)
    first = np.empty_like(order)
    first[order] = order[start]
    return first
