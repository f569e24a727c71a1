"""What `prepare` is given, as rows: files of rows as training reads them, and corpora as they are published.

A file may hold rows of several formats. All rows of one output are of one kind, that of the first row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmtune.data.encodings import Guess
from lmtune.data.formats import detect_format, kind_of_format, parse_row
from lmtune.data.prepare.corpora import Sources
from lmtune.data.prepare.pairing import RawRow
from lmtune.data.prepare.plan import Input
from lmtune.data.prepare.rows import Row, is_single, row_of
from lmtune.data.prepare.settings import Settings
from lmtune.data.readers import content_hash
from lmtune.data.report import FaultyRows
from lmtune.data.types import OUTCOMES, Example, RowKind
from lmtune.data.values import RowFault, listed_keys
from lmtune.errors import DataError
from lmtune.io.text import format_list, pluralize

_MOST_FAULTS = 1000


@dataclass
class Reading:
    """What was read.

    Attributes:
        kind: of the rows; None before the first.
        unusable: rows that are none, by reason; `faults` names the first of them.
        repaired: rows whose texts held NUL or half of a character, which no file of rows may hold.
        inputs: the files, and as what they were read.
        notes: what a person should know of the files, a line each.
    """

    kind: RowKind | None = None
    is_text: bool = False
    unusable: FaultyRows = field(default_factory=FaultyRows)
    faults: list[str] = field(default_factory=list)
    repaired: int = 0
    ignored_keys: set[str] = field(default_factory=set)
    outcomes: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)
    inputs: list[Input] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def rows(self, paths: Sequence[str], settings: Settings, folder: Path) -> Iterator[Row]:
        """The rows of `paths`, one after the other; `folder` is for this process alone.

        Raises:
            DataError: a path cannot be read at all.
        """
        for source in Sources(paths, settings, folder):
            count = 0
            for raw in source.rows:
                row = self._row(raw)
                if row is not None:
                    count += 1
                    yield row
            for file in source.files:
                self.inputs.append(Input(file.portable_name, content_hash(file), source.read_as, count))
            name = source.files[0].portable_name + (f" and {len(source.files) - 1} more" if source.files[1:] else "")
            self.notes.append(f"{name}: {source.read_as}: {pluralize(count)}")
            self.notes += [f"  {_shown(note)}" for note in source.notes]

    def _row(self, raw: RawRow) -> Row | None:
        try:
            return self._parsed(raw)
        except RowFault as fault:
            if fault.ends_file:
                raise DataError(f"{raw.place}: {fault}") from None
            self.unusable.add(str(fault), raw.place)
            if len(self.faults) < _MOST_FAULTS:
                self.faults.append(f"{raw.place}: {fault}")
            return None

    def _parsed(self, raw: RawRow) -> Row:
        fields = raw.fields
        if isinstance(fields, RowFault):
            raise fields
        if not isinstance(fields, dict):
            raise RowFault('a row must be an object like {"prompt": "…", "completion": "…"}')
        try:
            example = self._example(fields)
        except RowFault:
            readable = _readable(fields)
            if readable == fields:
                raise
            example = self._example(readable)
            self.repaired += 1
        self.outcomes.update(example.outcomes)
        if self.kind is None:
            self.kind, self.is_text = example.kind, example.text is not None
        if (example.kind, example.text is not None) != (self.kind, self.is_text):
            raise RowFault(
                f"the row is of another kind ({example.kind}{', a text' * (example.text is not None)}) than the first "
                "one; prepare rows of each kind by themselves"
            )
        return row_of(example, raw.place, raw.group)

    def _example(self, fields: dict[str, Any]) -> Example:
        format = detect_format(fields)
        parsed = parse_row(fields, format)
        self.ignored_keys |= parsed.ignored_keys
        self.warnings.update(parsed.warnings)
        return Example(
            "", 0, parsed.messages, parsed.text, parsed.rejected, parsed.label, parsed.weight,
            kind_of_format(format), tools=parsed.tools, outcomes=tuple(parsed.outcomes), origin=parsed.origin,
        )  # fmt: skip

    def described(self) -> list[str]:
        """What was read, and what of it is not in the rows, a line each."""
        lines = list(self.notes)
        if self.ignored_keys:
            lines.append(f"keys that are left out: {listed_keys(sorted(self.ignored_keys), 10)}")
        lines += [f"{pluralize(count)} {OUTCOMES[name]}" for name, count in self.outcomes.most_common()]
        lines += [f"warning: {warning} ({pluralize(count)})" for warning, count in self.warnings.most_common(20)]
        if self.repaired:
            lines.append(f"{pluralize(self.repaired)} held NUL or half of a character; these are left out")
        return lines

    def raise_for_faults(self) -> None:
        """Raise a DataError with the rows that cannot be used."""
        raise DataError(
            f"{pluralize(self.unusable.count)} cannot be used; fix what is named, or drop (step unusable)\n"
            f"{format_list(self.faults)}"
        )


def _shown(note: str) -> str:
    return f"warning: {note.warning}" if isinstance(note, Guess) else note


def _readable(value: Any) -> Any:
    """`value` without NUL and unpaired surrogates."""
    if isinstance(value, str):
        whole = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # a pair is one character
        return whole.replace("\0", "").replace("�", "") if whole != value or "\0" in value else value
    if isinstance(value, list):
        return [_readable(item) for item in value]
    if isinstance(value, dict):
        return {key: _readable(item) for key, item in value.items()}
    return value


def are_single(rows: Iterator[Row], kind: RowKind) -> bool:
    """Whether every row is one question and one answer, or one question."""
    return all(is_single(row.fields, kind) for row in rows)
