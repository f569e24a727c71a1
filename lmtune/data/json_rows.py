"""JSON values out of a file, each with the line where it begins: one a line (JSONL), or the items of one list.

    for line, item, row in read_rows(path):  # row is a value, or a RowFault that says why there is none
        ...

Memory is bounded by the longest row allowed, whatever the file's size: lines are read one at a time, and a list is
parsed item by item as its text arrives.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lmtune.data.encodings import encoding_advice
from lmtune.data.sources import foreign_kind
from lmtune.data.strict_json import Broken, StrictDecoder, Unfinished, decode_json, end_of_gap, excerpt
from lmtune.data.values import RowFault

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


# --- one list of rows ------------------------------------------------------------------------------------------------


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
