"""Data files in, checked examples out, and a report of everything that was wrong or odd on the way.

    report = ReadReport()
    for example in read_examples(find_files(["train.jsonl"]), report):
        ...
    report.raise_for_faults()

The reader is our own because a dataset library's JSON reader names no lines, fills missing keys with None and rewrites
strings that look like dates. It never stops at the first fault: a person fixes a file in one go, not in twenty. With
`data.faulty_rows: skip` faulty rows are left out instead, each counted; a file that cannot be read to its end, whose
missing rows nobody could count, is an error all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lmtune.data.formats import Format, RowFault, detect_format, parse_row, quoted
from lmtune.data.json_rows import read_rows
from lmtune.data.sources import DataFile
from lmtune.data.survey import FaultyRows, counted
from lmtune.data.types import Example
from lmtune.errors import DataError, listed

_SHOWN_KEYS, _KEY_CHARACTERS = 10, 100  # of the keys that are not used

FaultyChoice = Literal["error", "skip"]
MAX_FAULTS = 10_000  # a file of nothing but faults is told by far fewer; this bounds memory


@dataclass
class FileReport:
    """What one file held."""

    name: str
    format: Format | None = None
    format_line: int = 0  # the row that the format was read from
    told: set[str] = field(default_factory=set)  # faults that are told once a file
    num_rows: int = 0
    ignored_keys: set[str] = field(default_factory=set)  # the first of them, cut off
    warnings: dict[str, list[int]] = field(default_factory=dict)  # what is odd -> the first lines where
    warning_counts: dict[str, int] = field(default_factory=dict)


@dataclass
class ReadReport:
    """What was found while reading: faults stop the work afterwards, or are left out; warnings are only said."""

    faults: list[str] = field(default_factory=list)  # `file:line: what is wrong, what to do`
    num_faults: int = 0
    lasting: list[str] = field(default_factory=list)  # those of the faults that no leaving out of a row would mend
    faulty: FaultyRows = field(default_factory=FaultyRows)  # the rows that can be left out
    files: list[FileReport] = field(default_factory=list)

    def add_fault(self, where: str, reason: str, lasting: bool = False) -> None:
        """Remember what is wrong at `where`, as it is told; `lasting`: it is no matter of one row."""
        self.num_faults += 1
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(f"{where}: {reason}")
        if lasting and len(self.lasting) < MAX_FAULTS:
            self.lasting.append(f"{where}: {reason}")

    def include(self, other: ReadReport) -> None:
        """Take in what another report found; which rows were left out stays with it."""
        self.num_faults += other.num_faults
        self.faults += other.faults[: MAX_FAULTS - len(self.faults)]
        self.lasting += other.lasting[: MAX_FAULTS - len(self.lasting)]
        self.files += other.files

    def raise_for_faults(self, faulty_rows: FaultyChoice | None = "error", num_usable: int = 0) -> None:
        """Raise one `DataError` with the first 20 faults and the count, if there are any that stop the work.

        Args:
            faulty_rows: the setting `data.faulty_rows`; with `skip`, faulty rows stop nothing as long as one is left.
                None is `error` where there is no such setting.
            num_usable: rows that are left.
        """
        skips = faulty_rows == "skip" and num_usable > 0
        faults, count = (self.lasting, len(self.lasting)) if skips else (self.faults, self.num_faults)
        if not count:
            return
        more = f"\n  … and {count - len(faults):,} beyond those" if count > len(faults) else ""
        advice = f"fix {'it' if count == 1 else 'them'} and start again"
        if skips:
            advice += "; data.faulty_rows: skip leaves out single rows only"
        elif faulty_rows == "skip":
            advice += "; with data.faulty_rows: skip no row would be left"
        elif faulty_rows == "error" and not self.lasting:
            advice += ", or leave faulty rows out: data.faulty_rows: skip"
        raise DataError(f"{counted(count, 'fault')} in the data; {advice}\n{listed(faults)}{more}")

    @property
    def formats(self) -> dict[str, str]:
        """The format of each file by its name."""
        return {file.name: file.format for file in self.files if file.format}

    @property
    def warnings(self) -> list[str]:
        """One line for each odd thing in each file."""
        return [line for file in self.files for line in _describe_warnings(file)]


def read_examples(files: Sequence[DataFile], report: ReadReport) -> Iterator[Example]:
    """Every usable row, in order; what is not usable goes to `report` with its line."""
    for file in files:
        found = FileReport(file.portable_name)
        report.files.append(found)
        faults_before = report.num_faults
        for line, item, row in read_rows(file.path):
            example = _example(file, line, item, row, found, report)
            if example is not None:
                found.num_rows += 1
                yield example
        if not found.num_rows and report.num_faults == faults_before:
            report.add_fault(f"{file.name}:1", "the file holds no row; it must hold one row a line", lasting=True)


def _example(
    file: DataFile, line: int, item: int | None, row: object, found: FileReport, report: ReadReport
) -> Example | None:
    """The row as an example, or None with its fault reported."""
    try:
        if isinstance(row, RowFault):
            raise row
        if not isinstance(row, dict):
            raise RowFault('a row must be an object like {"prompt": "…", "completion": "…"}')
        format = detect_format(row)
        if found.format is None:
            found.format, found.format_line = format, line
        elif format != found.format:
            raise RowFault(
                f"here {format} rows begin in a file of {found.format} rows (line {found.format_line}); "
                "put them into a file of their own",
                once=format,
            )
        parsed = parse_row(row, format)
    except RowFault as fault:
        _report(fault, file, line, item, found, report)
        return None
    if parsed.ignored_keys and (room := _SHOWN_KEYS + 1 - len(found.ignored_keys)) > 0:
        found.ignored_keys |= set(sorted({key[:_KEY_CHARACTERS] for key in parsed.ignored_keys})[:room])
    for warning in parsed.warnings:
        found.warning_counts[warning] = found.warning_counts.get(warning, 0) + 1
        first = found.warnings.setdefault(warning, [])
        if len(first) < 3:
            first.append(line)
    return Example(file.portable_name, line, parsed.messages, parsed.text)


def _report(
    fault: RowFault, file: DataFile, line: int, item: int | None, found: FileReport, report: ReadReport
) -> None:
    if not fault.ends_file:
        report.faulty.add(str(fault), f"{file.portable_name}:{line}" + (f" (item {item})" if item is not None else ""))
    if fault.once in found.told:
        return
    if fault.once is not None:
        found.told.add(fault.once)
    reason = str(fault) if item is None else f"item {item}: {fault}"
    report.add_fault(f"{file.name}:{line}", reason, lasting=fault.ends_file)


def _describe_warnings(file: FileReport) -> list[str]:
    lines = []
    if file.ignored_keys:
        names = ", ".join(quoted(key) for key in sorted(file.ignored_keys)[:_SHOWN_KEYS]) + (
            ", …" if len(file.ignored_keys) > _SHOWN_KEYS else ""
        )
        lines.append(f"{file.name}: these keys are not used: {names}")
    for warning, first in file.warnings.items():
        count = file.warning_counts[warning]
        shown = ", ".join(str(line) for line in first) + (", …" if count > len(first) else "")
        lines.append(f"{file.name}: {warning} ({counted(count)}: line {shown})")
    return lines
