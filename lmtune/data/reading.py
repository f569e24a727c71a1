"""Data files in, checked examples out, and a report of every fault on the way.

    report = ReadReport()
    for example in read_examples(find_files(["train.jsonl"]), report):
        ...
    report.raise_for_faults()

JSONL is read line by line in bounded memory, a JSON list whole. The reader is our own because a dataset library's JSON
reader names no lines, fills missing keys with None and rewrites strings that look like dates. Reading does not stop at
a fault: a person fixes a file in one go, not in twenty.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from lmtune.data.formats import Format, detect_format, kind_of_format, parse_row
from lmtune.data.report import FaultyRows, RowCounter
from lmtune.data.sources import DataFile, foreign_kind
from lmtune.data.types import Example, RowKind
from lmtune.data.values import RowFault, listed_keys, quoted
from lmtune.errors import DataError
from lmtune.io.text import format_list, pluralize

FaultyChoice = Literal["error", "skip"]
MAX_FAULTS = 10_000  # kept in memory; all are counted
MAX_ROW_BYTES = 32 << 20  # of a line
_PIECE_BYTES = 1 << 20
_SHOWN_KEYS = 10  # of those that are not used
_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"  # JSON's white space; Python strips more
_BETWEEN_ITEMS = re.compile(r"[ \t\r\n,]*")


@dataclass
class FileReport:
    """What one file holds.

    Attributes:
        format_line: the row that the format was read from.
        told: kinds of faults that are reported once a file.
        ignored_keys: the first of the keys that are not used.
        warnings: lines, by what is odd about them.
    """

    name: str
    format: Format | None = None
    format_line: int = 0
    told: set[str] = field(default_factory=set)
    num_rows: int = 0
    ignored_keys: set[str] = field(default_factory=set)
    warnings: dict[str, RowCounter] = field(default_factory=dict)

    def describe_warnings(self) -> list[str]:
        """A line for each warning."""
        lines = [
            f"{warning} ({pluralize(rows.count)}: line {rows.examples})" for warning, rows in self.warnings.items()
        ]
        if self.ignored_keys:
            lines.insert(0, f"these keys are not used: {listed_keys(sorted(self.ignored_keys), _SHOWN_KEYS)}")
        return [f"{self.name}: {line}" for line in lines]


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
    def warnings(self) -> list[str]:
        """A line for each warning about each file."""
        return [line for file in self.files for line in file.describe_warnings()]


def read_examples(
    files: Sequence[DataFile], report: ReadReport, rows: RowKind | None = None
) -> Iterator[Example]:  # fmt: skip
    """Every usable row, in order; faults of the others go to `report`.

    `rows` is what is needed, and rows of other kinds are faults; None takes each as its keys say.
    """
    for file in files:
        found = FileReport(file.portable_name)
        report.files.append(found)
        faults_before = report.num_faults
        for line, item, row in read_rows(file.path):
            try:
                example = _example(line, row, found, rows)
            except RowFault as fault:
                if not fault.ends_file:
                    place = f"{file.portable_name}:{line}" + (f" (item {item})" if item else "")
                    report.faulty.add(str(fault), place)
                if fault.once is None or fault.once not in found.told:
                    found.told |= {fault.once} if fault.once else set()
                    reason = f"item {item}: {fault}" if item else str(fault)
                    report.add_fault(f"{file.name}:{line}", reason, fatal=fault.ends_file)
                continue
            found.num_rows += 1
            yield example
        if not found.num_rows and report.num_faults == faults_before:
            report.add_fault(f"{file.name}:1", "the file holds no row; it must hold one row a line", fatal=True)


def _example(line: int, row: object, found: FileReport, rows: RowKind | None) -> Example:
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
    for warning in parsed.warnings:
        found.warnings.setdefault(warning, RowCounter()).add(str(line))
    return Example(
        found.name, line, parsed.messages, parsed.text, parsed.rejected, parsed.label, parsed.weight,
        kind_of_format(format),
    )  # fmt: skip


# Line, number in the list if the file is one (counted from 1), a JSON value or the `RowFault` in its place.
Row = tuple[int, int | None, Any]


def read_rows(path: Path) -> Iterator[Row]:
    """Every JSON value of the file with its line, or a `RowFault` in place of one that cannot be read.

    The file ends after a fault that leaves no way to tell where the next row begins.
    """
    try:
        with open(path, "rb") as file:
            head = file.peek(4096).removeprefix(_BOM)
            if kind := foreign_kind(head, path.suffix):
                yield 1, None, RowFault(f"the file is {kind}", ends_file=True)
            else:
                yield from _list_items(file) if head.strip(_BLANK).startswith(b"[") else _lines(file)
    except OSError as error:
        yield 1, None, RowFault(f"the file cannot be read ({error.strerror or error})", ends_file=True)


def _lines(file: IO[bytes]) -> Iterator[Row]:
    """One value a line."""
    line = num_rows = 0
    while raw := file.readline(MAX_ROW_BYTES + 1):
        line += 1
        if len(raw) > MAX_ROW_BYTES and not raw.endswith(b"\n"):
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(_PIECE_BYTES)
            yield line, None, RowFault(f"the row is longer than {MAX_ROW_BYTES >> 20} MiB; cut it into shorter rows")
            continue
        raw = raw.removeprefix(_BOM).strip(_BLANK)  # also on a later line, where files were joined
        if raw == b"{" and not num_rows:
            reason = "the row goes on in the next line; write each row on one line, or all as a list […]"
            yield line, None, RowFault(reason, ends_file=True)
            return
        if raw:
            yield line, None, _parsed(raw)
            num_rows += 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no key stands twice: one of the two values would be lost."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RowFault(f"the key {quoted(twice)} stands twice in one object; keep one")
    return made


def _parsed(raw: bytes) -> Any:
    """The JSON value that fills a line, or the fault in it."""
    try:
        return json.loads(raw.decode(), object_pairs_hook=_object)
    except RowFault as fault:
        return fault
    except UnicodeDecodeError as error:
        return _not_utf8(error)
    except json.JSONDecodeError as error:
        return _not_json(error)
    except (RecursionError, ValueError) as error:  # nested too deep, or a number of thousands of digits
        return RowFault(f"not readable: {error}; a row is a flat object of texts")


def _not_utf8(error: UnicodeDecodeError, ends_file: bool = False) -> RowFault:
    """Told once: a whole file is in another encoding more often than single lines are damaged."""
    return RowFault(
        f"byte {error.start + 1} (0x{error.object[error.start]:02x}) is not UTF-8; save the file as UTF-8: "
        "iconv -f ITS_ENCODING -t UTF-8 (such as WINDOWS-1252 or GB18030)", once="encoding", ends_file=ends_file,
    )  # fmt: skip


def _not_json(error: json.JSONDecodeError, ends_file: bool = False) -> RowFault:
    breaks_off = error.msg.startswith("Unterminated string") or error.pos >= len(error.doc.rstrip())
    where = f"column {error.colno}: {error.msg}" + ("; the text breaks off here" if breaks_off else "")
    return RowFault(f"not JSON: {where}; a row is one object like {{…}} on one line", ends_file=ends_file)


def _list_items(file: IO[bytes]) -> Iterator[Row]:
    """The items of the list that fills the file, each with the line where it begins."""
    raw = file.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield raw.count(b"\n", 0, error.start) + 1, None, _not_utf8(error, ends_file=True)
        return
    del raw
    decoder, number, line, counted = json.JSONDecoder(object_pairs_hook=_object), 0, 1, 0
    position = _skip(text, text.index("[") + 1)
    while not text.startswith("]", position):
        line, counted, number = line + text.count("\n", counted, position), position, number + 1
        try:
            value, end = decoder.raw_decode(text, position)
        except RowFault as fault:
            value, (_, end) = fault, json.JSONDecoder().raw_decode(text, position)
        except json.JSONDecodeError as error:
            yield error.lineno, number, _not_json(error, ends_file=True)
            return
        except (RecursionError, ValueError) as error:
            yield line, number, RowFault(f"not readable: {error}", ends_file=True)
            return
        yield line, number, value
        position = _skip(text, end)
    if text[position + 1 :].strip():
        reason = "more text after the list's end; for one row a line, drop the list's brackets"
        yield line + text.count("\n", counted, _skip(text, position + 1)), None, RowFault(reason, ends_file=True)


def _skip(text: str, position: int) -> int:
    """Where what stands between the items of a list ends; a comma too many or too few is no fault."""
    match = _BETWEEN_ITEMS.match(text, position)
    assert match is not None
    return match.end()
