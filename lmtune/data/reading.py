"""Data files in, checked examples out, and a report of every fault on the way.

    report = ReadReport()
    for example in read_examples(find_files(["train.jsonl"]), report):
        ...
    report.raise_for_faults()

Rows are read one by one, in bounded memory (`readers.py`). Reading does not stop at a fault: a person fixes a file in
one go, not in twenty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lmtune.data.columns import Columns
from lmtune.data.encodings import Guess
from lmtune.data.formats import Format, detect_format, kind_of_format, parse_row
from lmtune.data.readers import read_rows
from lmtune.data.report import FaultyRows, RowCounter
from lmtune.data.sources import DataFile
from lmtune.data.types import Example, RowKind
from lmtune.data.values import RowFault, listed_keys
from lmtune.errors import DataError
from lmtune.io.text import format_list, pluralize

FaultyChoice = Literal["error", "skip"]
MAX_FAULTS = 10_000  # kept in memory; all are counted
_SHOWN_KEYS = 10  # of those that are not used


@dataclass
class FileReport:
    """What one file holds.

    Attributes:
        format_line: the row that the format was read from.
        said: what was found out about the file: its delimiter, its encoding.
        told: kinds of faults that are reported once a file.
        ignored_keys: the first of the keys that are not used.
        warnings: lines, by what is odd about them.
        is_passed_over: it is a sheet without rows of a workbook that has some.
    """

    name: str
    format: Format | None = None
    format_line: int = 0
    said: list[str] = field(default_factory=list)
    told: set[str] = field(default_factory=set)
    num_rows: int = 0
    ignored_keys: set[str] = field(default_factory=set)
    warnings: dict[str, RowCounter] = field(default_factory=dict)
    is_passed_over: bool = False

    def describe_warnings(self) -> list[str]:
        """A line for each warning."""
        lines = [
            f"{warning} ({pluralize(rows.count)}: line {rows.examples})" for warning, rows in self.warnings.items()
        ]
        if self.ignored_keys:
            lines.insert(0, f"these keys are not used: {listed_keys(sorted(self.ignored_keys), _SHOWN_KEYS)}")
        if self.is_passed_over:
            lines.append("the sheet holds no row under a header and is not read")
        guesses = [one.warning for one in self.said if isinstance(one, Guess)]
        return [f"{self.name}: {line}" for line in [*guesses, *lines]]


@dataclass
class ReadReport:
    """What was found while reading.

    Attributes:
        faults: `file:line: what is wrong, what to do`, the first `MAX_FAULTS`.
        fatal: those of the faults that no skipping of rows removes.
        faulty: the rows that can be skipped.
    """

    faults: list[str] = field(default_factory=list)
    num_faults: int = 0
    fatal: list[str] = field(default_factory=list)
    faulty: FaultyRows = field(default_factory=FaultyRows)
    files: list[FileReport] = field(default_factory=list)

    def add_fault(self, location: str, reason: str, fatal: bool = False) -> None:
        """Report a fault; `fatal`: skipping a row does not remove it."""
        self.num_faults += 1
        for faults in (self.faults, self.fatal) if fatal else (self.faults,):
            if len(faults) < MAX_FAULTS:
                faults.append(f"{location}: {reason}")

    def include(self, other: ReadReport) -> None:
        """Add the faults and files of another report, not its faulty rows."""
        self.num_faults += other.num_faults
        self.faults += other.faults
        self.fatal += other.fatal
        self.files += other.files

    def raise_for_faults(self, faulty_rows: FaultyChoice | None = "error", num_usable: int = 0) -> None:
        """Raise one `DataError` with the first 20 faults and the count, if there are any that stop the work.

        Args:
            faulty_rows: the setting `data.faulty_rows`; with `skip`, only fatal faults count if a row is left. None is
                `error` where there is no such setting.
            num_usable: rows that are left.
        """
        skips = faulty_rows == "skip" and num_usable > 0
        faults, count = (self.fatal, len(self.fatal)) if skips else (self.faults, self.num_faults)
        if not count:
            return
        advice = ""
        if faulty_rows == "skip":
            advice = "; data.faulty_rows: skip leaves out single rows only, and must leave one"
        elif faulty_rows == "error" and not self.fatal:
            advice = ", or leave faulty rows out: data.faulty_rows: skip"
        raise DataError(
            f"{pluralize(count, 'fault')} in the data; fix {'it' if count == 1 else 'them'} and start again{advice}\n"
            f"{format_list(faults)}"
        )

    @property
    def formats(self) -> dict[str, str]:
        """The format of each file by its name."""
        return {file.name: file.format for file in self.files if file.format}

    @property
    def read_as(self) -> dict[str, str]:
        """What was found out about files and how they are written, by their names."""
        return {file.name: ", ".join(file.said) for file in self.files if file.said}

    @property
    def warnings(self) -> list[str]:
        """A line for each warning about each file."""
        return [line for file in self.files for line in file.describe_warnings()]


def read_examples(
    files: Sequence[DataFile], report: ReadReport, rows: RowKind | None = None,
    columns: Mapping[str, str] | None = None, needs_columns: bool = True,
) -> Iterator[Example]:  # fmt: skip
    """Every usable row, in order; faults of the others go to `report`.

    Args:
        files: of `find_files`.
        report: what is found.
        rows: what is needed, so that rows of other kinds are faults; None takes each as its keys say.
        columns: the setting `data.columns`.
        needs_columns: a column that no file has is a fault; not of validation rows, which may be written otherwise.
    """
    renamed = Columns(columns)
    filled: set[Path] = set()
    forms: dict[bool, tuple[int, str]] = {}  # labels that are lists, and those that are not: how many, the first place
    empty: list[tuple[DataFile, FileReport]] = []
    for file in files:
        found = FileReport(file.portable_name)
        report.files.append(found)
        faults_before = report.num_faults
        for line, item, row in read_rows(file, found.said, renamed):
            try:
                example = _example(file, line, row, found, rows)
            except RowFault as fault:
                if not fault.ends_file:
                    report.faulty.add(str(fault), file.place(line) + (f" (item {item})" if item else ""))
                if fault.once is None or fault.once not in found.told:
                    found.told |= {fault.once} if fault.once else set()
                    reason = f"item {item}: {fault}" if item else str(fault)
                    report.add_fault(file.place(line, shown=True), reason, fatal=fault.ends_file)
                continue
            found.num_rows += 1
            if example.kind == "labelled":
                counted, place = forms.get(isinstance(example.label, tuple), (0, ""))
                forms[isinstance(example.label, tuple)] = counted + 1, place or file.place(line, shown=True)
            yield example
        if not found.num_rows and report.num_faults == faults_before:
            empty.append((file, found))
        else:
            filled.add(file.path)
    if len(forms) > 1:
        is_list = forms[True][0] <= forms[False][0]
        (_, place), (most, _) = forms[is_list], forms[not is_list]
        here, others = ("a list", "one label") if is_list else ("one label", "a list")
        reason = f"label is {here}, but {others} in {pluralize(most)}; write every label as a list, or none"
        report.add_fault(place, reason, fatal=True)
    for file, found in empty:
        found.is_passed_over = file.kind == "xlsx" and file.path in filled
        if not found.is_passed_over:
            reason = "the file holds no row; it must hold one row a line"
            report.add_fault(file.place(1, shown=True), reason, fatal=True)
    if needs_columns and renamed.unseen and not report.num_faults:
        report.add_fault("data.columns", f"no row has {listed_keys(sorted(renamed.unseen))}; remove it", fatal=True)


def _example(file: DataFile, line: int, row: object, found: FileReport, rows: RowKind | None) -> Example:
    if isinstance(row, RowFault):
        raise row
    if not isinstance(row, dict):
        raise RowFault('a row must be an object like {"prompt": "…", "completion": "…"}')
    format = detect_format(row, rows)
    if found.format is None:
        found.format, found.format_line = format, line
    elif format != found.format:
        raise RowFault(
            f"here {format} rows begin in a file of {found.format} rows (line {found.format_line}); "
            "put them into a file of their own",
            once=format,
        )
    parsed = parse_row(row, format)
    if len(found.ignored_keys) <= _SHOWN_KEYS:
        found.ignored_keys |= parsed.ignored_keys
    for warning in dict.fromkeys(parsed.warnings):  # once a row
        found.warnings.setdefault(warning, RowCounter()).add(str(line))
    return Example(
        found.name, line, parsed.messages, parsed.text, parsed.rejected, parsed.label, parsed.weight,
        kind_of_format(format), file.mark, parsed.tools, tuple(sorted(parsed.outcomes)), parsed.origin,
    )  # fmt: skip
