"""Data files in, checked examples out, and a report of every fault on the way.

    report = ReadReport()
    for example in read_examples(find_files(["train.jsonl"]), report):
        ...
    report.raise_for_faults()

`read_rows` gives each JSON value of a file with its line: JSONL line by line in bounded memory, a JSON list read whole.
`read_examples` makes an `Example` of each. The reader is our own because a dataset library's JSON reader names no
lines, fills missing keys with None and rewrites strings that look like dates.

Reading does not stop at a fault: a person fixes a file in one go, not in twenty. With `data.faulty_rows: skip` faulty
rows are left out and counted. A file that cannot be read to its end stays an error, because nobody could count its
missing rows.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from lmtune.data.formats import Format, detect_format, parse_row
from lmtune.data.report import FaultyRows, RowCounter
from lmtune.data.sources import DataFile, encoding_advice, foreign_kind
from lmtune.data.types import Example
from lmtune.data.values import RowFault, quoted
from lmtune.errors import DataError
from lmtune.io.text import format_list, pluralize

FaultyChoice = Literal["error", "skip"]
MAX_FAULTS = 10_000  # kept in memory; all are counted
MAX_ROW_BYTES = 32 << 20  # of a line
_PIECE_BYTES = 1 << 20
_SHOWN_KEYS, _KEY_CHARACTERS = 10, 100  # of the keys that are not used
_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"  # JSON's white space; Python strips more
_GAP = re.compile(r"[ \t\r\n]*")


@dataclass
class FileReport:
    """What one file holds.

    Attributes:
        format_line: the row that the format was read from.
        told: kinds of faults that are reported once a file.
        ignored_keys: the first of the keys that are not used, cut off.
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
        lines = []
        if self.ignored_keys:
            names = ", ".join(quoted(key) for key in sorted(self.ignored_keys)[:_SHOWN_KEYS])
            more = ", …" if len(self.ignored_keys) > _SHOWN_KEYS else ""
            lines.append(f"{self.name}: these keys are not used: {names}{more}")
        for warning, rows in self.warnings.items():
            lines.append(f"{self.name}: {warning} ({pluralize(rows.count)}: line {rows.examples})")
        return lines


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
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(f"{location}: {reason}")
        if fatal and len(self.fatal) < MAX_FAULTS:
            self.fatal.append(f"{location}: {reason}")

    def include(self, other: ReadReport) -> None:
        """Add the faults and files of another report, not its faulty rows."""
        self.num_faults += other.num_faults
        self.faults += other.faults[: MAX_FAULTS - len(self.faults)]
        self.fatal += other.fatal[: MAX_FAULTS - len(self.fatal)]
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
        more = f"\n  … and {count - len(faults):,} beyond those" if count > len(faults) else ""
        advice = f"fix {'it' if count == 1 else 'them'} and start again"
        if skips:
            advice += "; data.faulty_rows: skip leaves out single rows only"
        elif faulty_rows == "skip":
            advice += "; with data.faulty_rows: skip no row would be left"
        elif faulty_rows == "error" and not self.fatal:
            advice += ", or leave faulty rows out: data.faulty_rows: skip"
        raise DataError(f"{pluralize(count, 'fault')} in the data; {advice}\n{format_list(faults)}{more}")

    @property
    def formats(self) -> dict[str, str]:
        """The format of each file by its name."""
        return {file.name: file.format for file in self.files if file.format}

    @property
    def warnings(self) -> list[str]:
        """A line for each warning about each file."""
        return [line for file in self.files for line in file.describe_warnings()]


def read_examples(files: Sequence[DataFile], report: ReadReport) -> Iterator[Example]:
    """Every usable row, in order; faults of the others go to `report`."""
    for file in files:
        found = FileReport(file.portable_name)
        report.files.append(found)
        faults_before = report.num_faults
        for line, item, row in read_rows(file.path):
            try:
                example = _example(file, line, row, found)
            except RowFault as fault:
                _report(fault, file, line, item, found, report)
                continue
            found.num_rows += 1
            yield example
        if not found.num_rows and report.num_faults == faults_before:
            report.add_fault(f"{file.name}:1", "the file holds no row; it must hold one row a line", fatal=True)


def _example(file: DataFile, line: int, row: object, found: FileReport) -> Example:
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
    if parsed.ignored_keys and (room := _SHOWN_KEYS + 1 - len(found.ignored_keys)) > 0:
        found.ignored_keys |= set(sorted({key[:_KEY_CHARACTERS] for key in parsed.ignored_keys})[:room])
    for warning in parsed.warnings:
        found.warnings.setdefault(warning, RowCounter()).add(str(line))
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
    report.add_fault(f"{file.name}:{line}", reason, fatal=fault.ends_file)


# --- a file as JSON values

# line, number in the list if the file is one (counted from 1), a JSON value or the RowFault in its place
Row = tuple[int, int | None, Any]


def read_rows(path: Path) -> Iterator[Row]:
    """Every JSON value of the file with its line, or a `RowFault` in place of one that cannot be read.

    The file ends after a fault that leaves no way to tell where the next row begins.
    """
    try:
        with open(path, "rb") as file:
            if kind := foreign_kind(file.peek(4096), path.suffix):
                yield 1, None, RowFault(f"the file is {kind}", ends_file=True)
                return
            first = _first_byte(file)
            if not first:
                yield 1, None, RowFault("the file is empty; it must hold one row a line", ends_file=True)
                return
            yield from _list_items(file) if first == b"[" else _lines(file)
    except OSError as error:
        yield 1, None, RowFault(f"the file cannot be read ({error.strerror or error})", ends_file=True)


def _first_byte(file: IO[bytes]) -> bytes:
    """The first byte that is not white space, empty if there is none; `file` is back at its start."""
    piece = file.read(_PIECE_BYTES).removeprefix(_BOM)
    while piece and not piece.strip(_BLANK):
        piece = file.read(_PIECE_BYTES)
    file.seek(0)
    return piece.strip(_BLANK)[:1]


def _lines(file: IO[bytes]) -> Iterator[Row]:
    """One value a line."""
    decoder, line, num_rows = _Decoder(), 0, 0
    once = None  # set if the file does not begin with an object: a fault for each of its lines helps nobody
    while raw := file.readline(MAX_ROW_BYTES + 1):
        line += 1
        raw = raw.removeprefix(_BOM)  # also on a later line, where files were joined
        if len(raw) > MAX_ROW_BYTES and not raw.endswith(b"\n"):
            while (rest := file.readline(_PIECE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield line, None, RowFault(f"the row is longer than {MAX_ROW_BYTES >> 20} MiB; cut it into shorter rows")
            continue
        if not raw.strip(_BLANK):
            continue
        if not num_rows and not raw.lstrip(_BLANK).startswith(b"{"):
            once = "not an object"
        value: Any
        try:
            value = decoder.whole_value(raw.decode().rstrip("\r\n"))
        except UnicodeDecodeError as error:
            place = f"byte {error.start + 1} of the line"
            value = _not_utf8(place, raw[error.start], encoding_advice(_beginning(file)))
        except _Unfinished as fault:
            value = _unfinished_line(fault, raw, is_first=not num_rows)
        except RowFault as fault:
            value = fault
        if once is not None and not isinstance(value, dict):
            value = RowFault(str(value) if isinstance(value, RowFault) else "a row must be an object", once)
        yield line, None, value
        if isinstance(value, RowFault) and value.ends_file:
            return
        num_rows += 1


def _unfinished_line(fault: _Unfinished, raw: bytes, is_first: bool) -> RowFault:
    if not raw.endswith(b"\n"):
        return RowFault(f"the file ends in the middle of this row ({fault}); restore its end or remove it")
    if is_first and raw.rstrip(_BLANK).endswith((b"{", b"[")):
        return RowFault(
            "the row goes on in the next line; write each row on one line, or all as a list […]", ends_file=True
        )
    return RowFault(f"the row ends too early ({fault}); each row is one whole line")


def _beginning(file: IO[bytes]) -> bytes:
    """The first bytes of `file`, which stays where it is."""
    position = file.tell()
    file.seek(0)
    sample = file.read(_PIECE_BYTES)
    file.seek(position)
    return sample


def _not_utf8(place: str, byte: int, advice: str) -> RowFault:
    """`advice`: what the encoding probably is; a file in another one is told so once, not for every line."""
    reason = f"{place} (0x{byte:02x}) is not UTF-8; save the file as UTF-8{advice}"
    return RowFault(reason, once="encoding" if advice else None)


def _list_items(file: IO[bytes]) -> Iterator[Row]:
    """The items of the list that fills the file, each with the line where it begins."""
    raw = file.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, advice = raw.count(b"\n", 0, error.start) + 1, encoding_advice(raw[:_PIECE_BYTES])
        yield line, None, RowFault(str(_not_utf8("a byte", raw[error.start], advice)), ends_file=True)
        return
    del raw
    decoder, number, line, counted = _Decoder(), 1, 1, 0
    position = _skip_gap(text, text.index("[") + 1)
    try:
        while not text.startswith("]", position):
            line, counted = line + text.count("\n", counted, position), position
            value, end = decoder.value_at(text, position)
            yield line, number, value
            number += 1
            position = _skip_gap(text, end)
            if text.startswith(",", position):
                position = _skip_gap(text, position + 1)
            elif not text.startswith("]", position):
                raise _Broken(f"a comma or ] is missing after the row, found {_excerpt(text, position)}", position)
        position = _skip_gap(text, position + 1)
        if position < len(text):
            reason = f"more text after the list's end ({_excerpt(text, position)})"
            raise _Broken(f"{reason}; for one row a line, drop the list's brackets", position)
    except _Broken as fault:
        if isinstance(fault, _Unfinished):
            reason = "the file ends in the middle of this row; restore its end"
        else:
            line, reason = line + text.count("\n", counted, fault.position), str(fault)
        yield line, number, RowFault(reason, ends_file=True)


# --- one JSON value


class _Broken(RowFault):
    """The value is not JSON, so that its end is not known; `position` is where in the text."""

    def __init__(self, reason: str, position: int) -> None:
        super().__init__(reason)
        self.position = position


class _Unfinished(_Broken):
    """The text ends before the value does."""


class _Decoder:
    """`json`, which also refuses a key that stands twice in an object: one of the two values would be lost."""

    def __init__(self) -> None:
        self._json = json.JSONDecoder(object_pairs_hook=self._object)
        self._twice: str | None = None

    def value_at(self, text: str, start: int) -> tuple[Any, int]:
        """The value that begins at `start`, or the fault in it, and where it ends.

        Raises:
            _Unfinished: the text ends first.
            _Broken: the value is not JSON.
        """
        self._twice = None
        try:
            value, end = self._json.raw_decode(text, start)
        except json.JSONDecodeError as error:
            unfinished = error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip())
            column = error.pos - text.rfind("\n", 0, error.pos)
            raise (_Unfinished if unfinished else _Broken)(f"column {column}: {_reason(error)}", error.pos) from None
        except RecursionError:
            raise _Broken("brackets are nested too deep; a row is a flat object", start) from None
        except ValueError as error:  # an integer of thousands of digits
            raise _Broken(f"not readable: {error}", start) from None
        if self._twice is not None:
            return RowFault(f"the key {quoted(self._twice)} stands twice in one object; keep one"), end
        return value, end

    def whole_value(self, text: str) -> Any:
        """The one value in `text`.

        Raises:
            RowFault: with the column and what is wrong there.
        """
        value, end = self.value_at(text, _skip_gap(text, 0))
        end = _skip_gap(text, end)
        if end != len(text):
            raise RowFault(f"column {end + 1}: more text after the row ({_excerpt(text, end)}); write one row a line")
        if isinstance(value, RowFault):
            raise value
        return value

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            self._twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return found


def _skip_gap(text: str, position: int) -> int:
    match = _GAP.match(text, position)
    assert match is not None
    return match.end()


def _reason(error: json.JSONDecodeError) -> str:
    """What `json` says, with what it found and, for the usual mistakes, what to do."""
    found = error.doc[error.pos : error.pos + 1]
    if error.msg.startswith("Invalid control character"):
        return f"a raw control character (0x{ord(found):02x}) in a string; write it as \\n, \\t or \\u{ord(found):04x}"
    if not error.doc[: error.pos].strip() and found not in ("", "'"):
        return f"this is not JSON ({_excerpt(error.doc, error.pos)}); a row is an object like {{…}}"
    hint = "; JSON needs double quotes, not single quotes" if found == "'" else ""
    return f"{error.msg[0].lower()}{error.msg[1:]}, found {_excerpt(error.doc, error.pos)}{hint}"


def _excerpt(text: str, position: int) -> str:
    return quoted(text[position : position + 21], 20) if position < len(text) else "the end"
