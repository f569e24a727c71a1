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

import codecs
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from lmtune.data.formats import Format, detect_format, parse_row
from lmtune.data.report import FaultyRows
from lmtune.data.sources import DataFile, encoding_advice, foreign_kind
from lmtune.data.types import Example
from lmtune.data.values import RowFault, quoted
from lmtune.errors import DataError
from lmtune.io.text import format_list, pluralize

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
        raise DataError(f"{pluralize(count, 'fault')} in the data; {advice}\n{format_list(faults)}{more}")

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
        lines.append(f"{file.name}: {warning} ({pluralize(count)}: line {shown})")
    return lines


MAX_ROW_BYTES = 32 << 20
_PIECE_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"  # JSON's white space, which is less than what Python strips
# Line, number in the list if it is one (counted from 1), and a JSON value or the RowFault that stands in its place
Row = tuple[int, int | None, Any]


def read_rows(path: Path) -> Iterator[Row]:
    """Every value of the file with its line; a `RowFault` in place of one that cannot be read.

    After a fault that leaves no way to tell where the next row begins, the file ends.
    """
    try:
        with open(path, "rb") as file:
            # A file of the kernel's says that it holds nothing, and may never give what it does hold.
            if not os.fstat(file.fileno()).st_size:
                yield 1, None, RowFault("the file is empty; it must hold one row a line", ends_file=True)
                return
            head = file.peek(4096) if hasattr(file, "peek") else b""
            if kind := foreign_kind(head, path.suffix):
                yield 1, None, RowFault(f"the file is {kind}", ends_file=True)
                return
            first = _skip_blank(file)
            if first is None:
                yield 1, None, RowFault("the file is empty; it must hold one row a line", ends_file=True)
                return
            yield from _list_items(file) if first == b"[" else _lines(file)
    except OSError as error:
        yield 1, None, RowFault(f"the file cannot be read ({error.strerror or error})", ends_file=True)


def _skip_blank(file: IO[bytes]) -> bytes | None:
    """The first byte that is no white space, with `file` back at its start; None if there is none."""
    piece = file.read(_PIECE_BYTES).removeprefix(_BOM)
    while piece and not piece.strip(_BLANK):
        piece = file.read(_PIECE_BYTES)
    file.seek(0)
    return piece.strip(_BLANK)[:1] or None


def _lines(file: IO[bytes]) -> Iterator[Row]:
    """One value a line."""
    line = num_rows = 0
    encoding: str | None = None  # advice about it, once it was asked for
    once = None  # set where the file begins with lines that are no rows: a fault for each would help nobody
    while raw := file.readline(MAX_ROW_BYTES + 1):
        line += 1
        raw = raw.removeprefix(_BOM)  # also in the middle, where files were put together
        if len(raw) > MAX_ROW_BYTES and not raw.endswith(b"\n"):
            _skip_line(file)
            yield line, None, _too_long()
            continue
        if not raw.strip(_BLANK):
            continue
        try:
            value = decode_json(raw.decode("utf-8").rstrip("\r\n"))
            yield line, None, value if once is None or isinstance(value, dict) else RowFault("not an object", once)
        except UnicodeDecodeError as error:
            encoding = _sample_of(file) if encoding is None else encoding
            yield line, None, _not_utf8(f"byte {error.start + 1} of the line", raw[error.start], encoding)
        except Broken as fault:
            following = _next_filled(file)
            one_row_a_line = num_rows > 0 or following is None or following.removeprefix(_BOM).lstrip().startswith(b"{")
            described = _described(fault, following is None, one_row_a_line)
            once = once if one_row_a_line else "no rows"
            yield line, None, described if described.ends_file else RowFault(str(described), once)
            if described.ends_file:
                return
        except RowFault as fault:
            yield line, None, fault if once is None else RowFault(str(fault), once)
        num_rows += 1


def _described(fault: Broken, is_last: bool, one_row_a_line: bool) -> RowFault:
    """The fault of a line with what its surroundings say about the cause."""
    if not isinstance(fault, Unfinished):
        return fault
    if is_last:
        return RowFault(f"the file ends in the middle of this row ({fault}); restore its end or remove it")
    if not one_row_a_line:
        return RowFault(
            "the row goes on in the next line; write each row on one line, or all as a list […]", ends_file=True
        )
    return RowFault(f"the row ends too early ({fault}); each row is one whole line")


def _skip_line(file: IO[bytes]) -> None:
    while (raw := file.readline(_PIECE_BYTES)) and not raw.endswith(b"\n"):
        pass


def _next_filled(file: IO[bytes]) -> bytes | None:
    """The next line that is not blank, leaving `file` where it is; None at the end."""
    position = file.tell()
    piece: bytes | None = None
    while (raw := file.readline(_PIECE_BYTES)) and not raw.strip(_BLANK):
        pass
    piece = raw or None
    file.seek(position)
    return piece


def _sample_of(file: IO[bytes]) -> str:
    """What the file's beginning says of its encoding, leaving `file` where it is."""
    position = file.tell()
    file.seek(0)
    advice = encoding_advice(file.read(_PIECE_BYTES))
    file.seek(position)
    return advice


def _not_utf8(where: str, byte: int, advice: str) -> RowFault:
    """`advice`: what the encoding probably is; a file in another one is told so once, not for every line."""
    reason = f"{where} (0x{byte:02x}) is not UTF-8; save the file as UTF-8{advice}"
    return RowFault(reason, once="encoding" if advice else None)


def _too_long() -> RowFault:
    return RowFault(f"the row is longer than {MAX_ROW_BYTES >> 20} MiB; cut it into shorter rows")


def _is_long(text: str, start: int, end: int) -> bool:
    """Whether what stands there has more bytes than a row may; most need no counting."""
    if end - start > MAX_ROW_BYTES:
        return True
    return 4 * (end - start) > MAX_ROW_BYTES and len(text[start:end].encode()) > MAX_ROW_BYTES


def _list_items(file: IO[bytes]) -> Iterator[Row]:
    """The items of the list that fills the file, each with the line where it begins."""
    text, number = _ArrivingText(file), 1
    try:
        text.take("[")
        while text.next_character() != "]":
            line, value = text.take_value()
            yield line, number, value
            number += 1
            if text.next_character() not in (",", "]"):
                raise RowFault(f"a comma or ] is missing after the row, found {text.excerpt()}")
            if text.next_character() == ",":
                text.take(",")
                if text.next_character() == "]":
                    raise RowFault("a comma stands before the closing ]; remove it")
        text.take("]")
        if text.next_character():
            raise RowFault(
                f"more text after the list's end ({text.excerpt()}); for one row a line, drop the list's brackets"
            )
    except RowFault as fault:
        yield text.line, number, RowFault(str(fault), ends_file=True)


class _ArrivingText:
    """The part of a file's text that is in memory, from the place reached on; it grows as it is needed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = StrictDecoder()
        self._text = ""
        self._first_column = 1  # of `_text`
        self._position = 0
        self._ended = False
        self.line = 1  # of the place reached

    def next_character(self) -> str:
        """The next character that is no white space, which is now the place reached; "" at the end."""
        self.skip_gap()
        return self._text[self._position : self._position + 1]

    def skip_gap(self) -> None:
        while True:
            self._move(end_of_gap(self._text, self._position))
            if self._position < len(self._text) or self._ended:
                return
            self._grow()

    def take(self, character: str) -> None:
        """Step over `character`, which is the next one."""
        assert self.next_character() == character
        self._move(self._position + len(character))

    def take_value(self) -> tuple[int, Any]:
        """The value at the place reached, and its line."""
        line, earlier = self.line, ""
        while True:
            try:
                value, end = self._json.value_at(self._text, self._position, self._first_column)
                if end < len(self._text) or self._ended:  # a number at the very end might go on
                    long = _is_long(self._text, self._position, end)
                    self._move(end)
                    return line, _too_long() if long else value
            except Unfinished:
                if self._ended:
                    raise RowFault("the file ends in the middle of this row; restore its end") from None
            except Broken as fault:
                # A good value cut at the end of a piece (`1.5e`, `tru`) looks broken too, but not again with more text.
                if self._ended or str(fault) == earlier:
                    self._move(fault.position)
                    raise
                earlier = str(fault)
            if len(self._text) - self._position > MAX_ROW_BYTES:
                raise _too_long()
            self._grow()

    def excerpt(self) -> str:
        return excerpt(self._text, self._position) if self._position < len(self._text) else "the end of the file"

    def _move(self, position: int) -> None:
        self.line += self._text.count("\n", self._position, position)
        self._position = position

    def _grow(self) -> None:
        """Read as much again as is waiting, at least one piece, and forget what lies behind the place reached."""
        waiting, behind = self._text[self._position :], self._text[: self._position]
        newline = behind.rfind("\n")
        self._first_column = len(behind) - newline if newline >= 0 else self._first_column + len(behind)
        raw = self._file.read(max(_PIECE_BYTES, len(waiting)))
        self._ended = not raw
        try:
            self._text = waiting + self._utf8.decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            before = error.object[: error.start]
            self.line += waiting.count("\n") + before.count(b"\n")
            raise _not_utf8("a byte", error.object[error.start], encoding_advice(error.object)) from None
        self._position = 0


MAX_DEPTH = 100  # of brackets in a row; how deep Python itself can go differs from version to version
_GAP = re.compile(r"[ \t\r\n]*")
_TOO_DEEP = "brackets are nested too deep; a row is a flat object"


class Broken(RowFault):
    """The value is no JSON, so that its end is not known; `position` is where in the text."""

    def __init__(self, reason: str, position: int) -> None:
        super().__init__(reason)
        self.position = position


class Unfinished(Broken):
    """The text ended before the value did."""


class StrictDecoder:
    """`json`, with what it passes in silence as faults: a key given twice, NaN and Infinity."""

    def __init__(self) -> None:
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)
        self._problems: list[str] = []  # of the value being decoded

    def value_at(self, text: str, start: int, first_column: int = 1) -> tuple[Any, int]:
        """The value that begins at `start`, or the fault in it, and where it ends; the text begins in `first_column`.

        Raises:
            Unfinished: the text ends first.
            Broken: the value is no JSON.
        """
        self._problems.clear()
        try:
            value, end = self._decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            newline = text.rfind("\n", 0, error.pos)
            column = error.pos - newline if newline >= 0 else error.pos + first_column
            unfinished = error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip())
            kind = Unfinished if unfinished else Broken
            raise kind(f"column {column}: {_in_words(error, text)}", error.pos) from None
        except RecursionError:
            raise Broken(_TOO_DEEP, start) from None
        except ValueError as error:  # an integer of thousands of digits
            raise Broken(f"not readable: {error}", start) from None
        if text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH and _is_deep(value):
            self._problems.append(_TOO_DEEP)
        return RowFault("; ".join(self._problems)) if self._problems else value, end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            self._problems.append(f"the key {quoted(twice)} stands twice in one object; keep one")
        return found

    def _constant(self, name: str) -> None:
        self._problems.append(f"{name} is not JSON; write null or a number")


def _is_deep(value: Any) -> bool:
    """Whether `value` is nested deeper than `MAX_DEPTH`."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return any(isinstance(value, (dict, list)) for value in level)


def decode_json(text: str) -> Any:
    """The one JSON value in `text`.

    Raises:
        RowFault: with the column and what is wrong there.
    """
    value, end = StrictDecoder().value_at(text, end_of_gap(text, 0))
    end = end_of_gap(text, end)
    if end != len(text):
        raise RowFault(f"column {end + 1}: more text after the row's end ({excerpt(text, end)}); write one row a line")
    if isinstance(value, RowFault):
        raise value
    return value


def end_of_gap(text: str, position: int) -> int:
    match = _GAP.match(text, position)
    assert match is not None
    return match.end()


def _in_words(error: json.JSONDecodeError, text: str) -> str:
    found = text[error.pos : error.pos + 1]
    if error.msg.startswith("Unterminated string"):
        return "a string is not closed; a quotation mark is missing"
    if error.msg.startswith("Invalid control character"):
        return f"a raw control character (0x{ord(found):02x}) in a string; write it as \\n, \\t or \\u{ord(found):04x}"
    if not text[: error.pos].strip() and found not in ("", "'"):
        return f"this is not JSON ({excerpt(text, error.pos)}); a row is an object like {{…}}"
    if found == "'":
        return f"single quotes ({excerpt(text, error.pos)}); JSON wants double quotes"
    what = error.msg[0].lower() + error.msg[1:]
    return f"{what}{f', found {excerpt(text, error.pos)}' if found else ', found the end'}"


def excerpt(text: str, position: int) -> str:
    return quoted(text[position : position + 21], 20)
