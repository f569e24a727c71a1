"""Which encoding a text file is in, and its bytes as UTF-8: files from spreadsheets are often in another one.

    name = detect_encoding(chunks)          # "Windows-1252"; None: UTF-8, or none that can be told with certainty

A byte order mark and the zeros of UTF-16 leave no doubt. Of the encodings without marks only two are taken, and only
where the bytes look like nothing else: GB18030, whose characters come in pairs of high bytes, and Windows-1252, whose
letters stand alone between ASCII. A file that holds UTF-8 beside something else is damaged, not in another encoding.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterable
from typing import BinaryIO

CODECS = {"GB18030": "gb18030", "Windows-1252": "cp1252"}
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)  # fmt: skip
_RUNS = re.compile(rb"[\x80-\xff]+")
# Letters, quotation marks and signs of western texts
_WESTERN = re.compile(
    rb"[\xc0-\xfe\x80\x85\x8a\x8c\x8e\x91-\x97\x99\x9a\x9c\x9e\xa0-\xa3\xa7-\xab\xae\xb0-\xb4\xb7-\xbf]"
)
_CHINESE = re.compile(rb"(?:[\xa1-\xa3\xb0-\xf7][\xa1-\xfe])+")  # punctuation and characters of GB 2312
_SHARE = 0.8  # of what must look like an encoding


def marked_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 where the first bytes say so: by a byte order mark, or by the zeros between ASCII letters."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    zeros = [place for place, byte in enumerate(head[:4]) if not byte]
    return {(1, 3): "UTF-16-LE", (0, 2): "UTF-16-BE", (1, 2, 3): "UTF-32-LE", (0, 1, 2): "UTF-32-BE"}.get(tuple(zeros))


def detect_encoding(chunks: Iterable[bytes]) -> str | None:
    """GB18030 or Windows-1252, if the whole content is valid there and looks like it; else None, as for UTF-8."""
    utf8, has_utf8 = codecs.getincrementaldecoder("utf-8")(), False
    chinese = codecs.getincrementaldecoder("gb18030")()
    western_bytes = high_bytes = paired_bytes = runs = alone = 0
    is_utf8 = is_chinese = True
    for chunk in chunks:
        if is_utf8:
            try:
                has_utf8 |= not utf8.decode(chunk).isascii()
            except UnicodeDecodeError as error:
                is_utf8 = False
                if has_utf8 or not error.object[: error.start].isascii():
                    return None
        if chunk.isascii():
            continue
        for run in _RUNS.findall(chunk):
            runs, alone, high_bytes = runs + 1, alone + (len(run) == 1), high_bytes + len(run)
            western_bytes += len(_WESTERN.findall(run))
            paired_bytes += sum(map(len, _CHINESE.findall(run)))
        if is_chinese:
            try:
                chinese.decode(chunk)
            except UnicodeDecodeError:
                is_chinese = False
    if is_utf8 or not high_bytes:
        return None
    if is_chinese and alone < runs * (1 - _SHARE) and paired_bytes >= _SHARE * high_bytes:
        return "GB18030"
    return "Windows-1252" if alone >= _SHARE * runs and western_bytes == high_bytes else None


class Transcoded(io.RawIOBase):
    """A file in another encoding, read as UTF-8; UnicodeDecodeError where it is not valid there."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder(CODECS.get(encoding, encoding))()
        self._ready = b""

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """The next bytes."""
        ended = False
        while not self._ready and not ended:
            raw = self._file.read(1 << 16)
            ended = not raw
            self._ready = self._decoder.decode(raw, final=ended).encode("utf-8", "surrogatepass")
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count
