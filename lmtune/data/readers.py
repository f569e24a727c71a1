"""Files of rows by what they are: JSONL, JSON, CSV, TSV, Parquet, Excel; `.gz` and `.zst` are unpacked on the way.

    for number, item, row in read_rows(file, said):      # `file` is one of `find_files`
        place = file.place(number)                        # `rows.csv:17`, `rows.parquet:row 17`

A further kind is one more entry of `READERS` here and of `KINDS` in `sources.py`. Rows come one by one, in bounded
memory. The readers are our own because those of data set libraries name no lines, fill missing keys with None and
rewrite strings that look like dates. What they find out (a delimiter, an encoding) is appended to `said`.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from lmtune.data.columns import Columns
from lmtune.data.encodings import CODECS, Detected, Transcoded, detect_encoding, marked_encoding
from lmtune.data.hub_rows import hub_bytes, hub_rows, hub_sha256
from lmtune.data.sources import DataFile, find_files, foreign_kind
from lmtune.data.tables import Row, TableRow, csv_rows, not_utf8, parquet_rows, typed
from lmtune.data.values import RowFault, unique_keys
from lmtune.data.workbooks import sheet_rows
from lmtune.io.atomic import file_sha256

MAX_ROW_BYTES = 32 << 20  # of a line, and of an item of a list
_PIECE_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"  # JSON's white space; Python strips more
_BETWEEN_ITEMS = re.compile(r"[ \t\r\n,]*")
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"

# A row: its number in the source, its number in the list if the file is one (counted from 1), and a JSON value or the
# `RowFault` in its place.


def read_rows(file: DataFile, said: list[str] | None = None, columns: Columns | None = None) -> Iterator[Row]:
    """Every row of a source with its number there, or a `RowFault` in place of one that cannot be read.

    The file ends after a fault that leaves no way to tell where the next row begins.

    Args:
        file: one of `find_files`.
        said: takes what was found out about the file.
        columns: renames keys; None leaves them as they are.
    """
    said = [] if said is None else said
    rename = None if columns is None else columns.of_file(said)
    number = 1
    try:
        for number, item, row in READERS[file.kind](file, said):
            try:
                yield number, item, _as_read(row, rename)
            except RowFault as fault:
                at_header = fault.ends_file and isinstance(row, TableRow)
                yield row.header if at_header else number, item, fault
                if fault.ends_file:
                    return
    except (OSError, EOFError, zlib.error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        yield number, None, RowFault(f"the file cannot be read ({reason})", ends_file=True)
    except UnicodeDecodeError as error:
        reason = f"behind this row the file is not valid {error.encoding}; save it as UTF-8"
        yield number, None, RowFault(reason, ends_file=True)


def _as_read(row: Any, rename: Callable[[dict[str, Any]], dict[str, Any]] | None) -> Any:
    if rename is not None and isinstance(row, dict):
        row = rename(row)
    return typed(row) if isinstance(row, TableRow) else row


def open_data(path: Path) -> io.BufferedReader:
    """The bytes of a file, unpacked if it is compressed with gzip or zstd."""
    file = open(path, "rb")  # noqa: SIM115 - the caller closes it
    head = file.peek(4)
    if head.startswith(_GZIP):
        return io.BufferedReader(gzip.GzipFile(fileobj=file))
    if head.startswith(_ZSTD):
        import pyarrow as pa

        file.close()
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return file


def open_text(path: Path, said: list[str], detects: bool = True) -> io.BufferedReader:
    """The bytes of a text file as UTF-8, whatever it is in; with `detects` the whole file may be read for that."""
    return _opened(path, said, detects)[0]


def _opened(path: Path, said: list[str], detects: bool = True) -> tuple[io.BufferedReader, str]:
    """As `open_text`, and how to convert what is not UTF-8 in it."""
    file = open_data(path)
    encoding: str | None = marked_encoding(file.peek(4)[:4])
    advice = ""
    if encoding is None and detects:
        found = detected(path)
        encoding, advice = found.encoding, found.advice(path.name)
    if encoding is None:
        return file, advice
    said.append(encoding)
    return io.BufferedReader(Transcoded(file, encoding)), advice


def detected(path: Path) -> Detected:
    """What is found out about the encoding of a file without a mark."""
    with open_data(path) as file:
        return detect_encoding(iter(lambda: file.read(_PIECE_BYTES), b""))


def _json(file: DataFile, said: list[str]) -> Iterator[Row]:
    found: list[str] = []
    with open_text(file.path, found, detects=False) as text:
        head = text.peek(4096).removeprefix(_BOM)
        if kind := foreign_kind(head):
            yield 1, None, RowFault(f"the file is {kind}", ends_file=True)
            return
        if not head.strip(_BLANK).startswith(b"["):
            said += found
            yield from _lines(text, file.path, said)
            return
    text, advice = _opened(file.path, said)
    with text:
        yield from _list_items(text, advice)


def _csv(file: DataFile, said: list[str]) -> Iterator[Row]:
    text, advice = _opened(file.path, said)
    with text:
        if kind := foreign_kind(text.peek(4096).removeprefix(_BOM)):
            yield 1, None, RowFault(f"the file is {kind}", ends_file=True)
        else:
            yield from csv_rows(text, said, advice)


READERS: dict[str, Callable[[DataFile, list[str]], Iterator[Row]]] = {
    "json": _json,
    "csv": _csv,
    "parquet": lambda file, said: parquet_rows(file.path, said),
    "xlsx": lambda file, said: sheet_rows(file.path, file.part, said),
    "hub": lambda file, said: hub_rows(file.path, file.part, said, _file_rows),
}


def _file_rows(path: Path, said: list[str]) -> Iterator[Row]:
    """The rows of one file of a data set."""
    (file,) = find_files([path])
    return READERS[file.kind](file, said)


def content_hash(file: DataFile) -> str:
    """SHA-256, in hex, of what the source holds.

    Raises:
        DataError: a data set cannot be had from the Hub.
    """
    return hub_sha256(file.path, file.part) if file.kind == "hub" else file_sha256(file.path)


def num_bytes(file: DataFile) -> int:
    """How large the source is."""
    return hub_bytes(file.path, file.part) if file.kind == "hub" else file.path.stat().st_size


# --- JSON


def _lines(file: IO[bytes], path: Path, said: list[str]) -> Iterator[Row]:
    """One value a line."""
    line = num_rows = 0
    codec, advice, is_ascii = "utf-8", "", True
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
        if not raw:
            continue
        if is_ascii and not raw.isascii():  # the first letter that tells
            is_ascii = False
            if not _is_utf8(raw):
                found = detected(path)
                advice = found.advice(path.name)
                if found.encoding is not None:
                    said.append(found.encoding)
                    codec = CODECS[found.encoding]
        yield line, None, _parsed(raw, codec, advice)
        num_rows += 1


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _parsed(raw: bytes, codec: str, advice: str) -> Any:
    """The JSON value that fills a line, or the fault in it."""
    try:
        return json.loads(raw.decode(codec), object_pairs_hook=unique_keys)
    except RowFault as fault:
        return fault
    except UnicodeDecodeError as error:
        return not_utf8(error, advice)
    except json.JSONDecodeError as error:
        return _not_json(error)
    except (RecursionError, ValueError) as error:  # nested too deep, or a number of thousands of digits
        return RowFault(f"not readable: {error}; a row is a flat object of texts")


def _not_json(error: json.JSONDecodeError, ends_file: bool = False, column: int | None = None) -> RowFault:
    breaks_off = error.msg.startswith("Unterminated string") or error.pos >= len(error.doc.rstrip())
    where = f"column {column or error.colno}: {error.msg}" + ("; the text breaks off here" if breaks_off else "")
    return RowFault(f"not JSON: {where}; a row is one object like {{…}} on one line", ends_file=ends_file)


class _Window:
    """The part of a text that is being parsed.

    Attributes:
        text: what is read and not yet left out.
        position: where the next item is looked for.
        ended: whether `text` holds the rest of the file.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._decoder = file, codecs.getincrementaldecoder("utf-8")()
        self.text, self.position, self.ended = "", 0, False
        self._line, self._column = 1, 0  # of the first character of `text`
        self._counted, self._counted_line = 0, 1

    def grow(self) -> None:
        """Leave out what stands before the position, and read as much again as there is."""
        first_of_line = self.text.rfind("\n", 0, self.position) + 1
        self._line = self.line
        self._column = self.position - first_of_line + (0 if first_of_line else self._column)
        self.text, self.position, self._counted, self._counted_line = self.text[self.position :], 0, 0, self._line
        piece = self._file.read(max(_PIECE_BYTES, len(self.text)))
        self.ended = not piece
        self.text += self._decoder.decode(piece, final=self.ended)

    @property
    def line(self) -> int:
        """Of the position."""
        self._counted_line += self.text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._counted_line

    def skip(self) -> bool:
        """Go to the next item, or the list's end; a comma too many or too few is no fault. False at the file's end."""
        while True:
            match = _BETWEEN_ITEMS.match(self.text, self.position)
            assert match is not None
            self.position = match.end()
            if self.position < len(self.text) or self.ended:
                return self.position < len(self.text)
            self.grow()

    def not_utf8(self, error: UnicodeDecodeError, advice: str) -> tuple[int, RowFault]:
        """The fault in what `grow` read last, and its line."""
        line = self._line + self.text.count("\n") + error.object.count(b"\n", 0, error.start)
        return line, not_utf8(error, advice, ends_file=True)

    def not_json(self, error: json.JSONDecodeError) -> tuple[int, RowFault]:
        """The fault in `text`, and its line."""
        column = error.colno + (self._column if error.lineno == 1 else 0)
        return self._line + error.lineno - 1, _not_json(error, ends_file=True, column=column)


def _list_items(file: IO[bytes], advice: str) -> Iterator[Row]:
    """The items of the list that fills the file, each with the line where it begins."""
    window, number = _Window(file), 0
    try:
        while "[" not in window.text:
            window.grow()
        window.position = window.text.index("[") + 1
        while window.skip() and window.text[window.position] != "]":
            number += 1
            line = window.line
            value = _next_item(window)
            if isinstance(value, json.JSONDecodeError):
                line, value = window.not_json(value)
            yield line, number, value
            if isinstance(value, RowFault) and value.ends_file:
                return
        if window.position == len(window.text):
            reason = "the list has no end; the text breaks off here"
            yield window.line, None, RowFault(reason, ends_file=True)
            return
        window.position += 1
        if window.skip():
            reason = "more text after the list's end; for one row a line, drop the list's brackets"
            yield window.line, None, RowFault(reason, ends_file=True)
    except UnicodeDecodeError as error:
        line, fault = window.not_utf8(error, advice)
        yield line, None, fault


def _next_item(window: _Window) -> Any:
    """The item at the position, which moves behind it; a `RowFault`, or what is wrong with the JSON."""
    whole, plain = json.JSONDecoder(object_pairs_hook=unique_keys), json.JSONDecoder()
    while True:
        try:
            try:
                value, end = whole.raw_decode(window.text, window.position)
            except RowFault as fault:
                value, end = fault, plain.raw_decode(window.text, window.position)[1]
            if end < len(window.text) or window.ended:
                window.position = end
                return value
        except json.JSONDecodeError as error:
            if window.ended:
                return error
        except (RecursionError, ValueError) as error:
            return RowFault(f"not readable: {error}", ends_file=True)
        if len(window.text) - window.position > MAX_ROW_BYTES:
            return RowFault(
                f"not JSON, or a row longer than {MAX_ROW_BYTES >> 20} MiB; cut it into shorter rows", ends_file=True
            )
        window.grow()
