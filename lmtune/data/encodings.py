"""Which encoding a text file is in, and its bytes as UTF-8: files from spreadsheets are often in another one.

    found = detect_encoding(chunks)
    found.encoding        # "Windows-1252", which is a guess with a sample; None: UTF-8, or none that can be told
    found.advice("a.csv") # what to do where it is not UTF-8 and cannot be told

A byte order mark and the zeros of UTF-16 leave no doubt. Of the encodings without marks only two are taken. GB18030:
where the text is made of frequent Chinese characters, which Korean or Japanese read as Chinese is not. Windows-1252:
where the text reads better than in every other encoding of the same bytes, and hardly a line reads better there. What
is taken is a warning with a sample, for a person to see. A file that holds UTF-8 beside something else is damaged, not
in another encoding.
"""

from __future__ import annotations

import codecs
import io
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from lmtune.data import letters
from lmtune.data.values import quoted

CODECS = {"GB18030": "gb18030", "Windows-1252": "cp1252"}
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)  # fmt: skip
_BEYOND = re.compile(rb"[\x80-\xff]+")
# By the names that iconv knows: encodings of one byte a letter that hold Latin letters.
_LATIN = {
    "WINDOWS-1252": "cp1252", "WINDOWS-1250": "cp1250", "ISO-8859-2": "iso8859_2", "WINDOWS-1254": "cp1254",
    "WINDOWS-1257": "cp1257", "ISO-8859-15": "iso8859_15", "CP850": "cp850", "MACINTOSH": "mac_roman",
}  # fmt: skip
_EAST = {"CP949": "cp949", "EUC-JP": "euc_jp", "CP932": "cp932", "BIG5": "cp950"}
_KANA, _HANGUL = ("\u3040", "\u30ff"), ("\uac00", "\ud7a3")
_ALONE = 0.8  # of the runs of bytes beyond ASCII, which a Latin letter between ASCII letters is
_COMMON = 0.25  # of Chinese, at least; half is usual
_FOREIGN = 0.02  # letters of Japanese and Korean in Chinese, at most
_LATER_LINES = 20_000  # behind these, one line in 32 is scored
_LEAST = -4.0  # a letter, on average
_MARGIN, _STRONG = 2.0, 5.0  # by which a text, a line, reads better in another encoding
_STRONG_SHARE = 0.005


class Guess(str):
    """The name of an encoding that was found without a mark, with a piece of text as it reads there."""

    sample: str = ""

    @classmethod
    def of(cls, name: str, sample: str) -> Guess:
        """Name and sample."""
        guess = cls(name)
        guess.sample = sample
        return guess

    @property
    def warning(self) -> str:
        """What a person should look at."""
        return (
            f"the encoding is a guess: {self}; it reads {quoted(self.sample, 60)}; if this is wrong, save it as UTF-8"
        )


@dataclass(frozen=True)
class Detected:
    """What was found out about a file without marks.

    Attributes:
        encoding: what it is read in; None for UTF-8, and where it cannot be told.
        like: an encoding in which it reads well, which is not certain; "" where none is known.
        damaged: it holds UTF-8 beside something else.
    """

    encoding: Guess | None = None
    like: str = ""
    sample: str = ""
    damaged: bool = False

    def advice(self, name: str) -> str:
        """How to convert the file `name`, which holds what is not UTF-8."""
        known = self.like or "ITS_ENCODING"
        command = shlex.join(["iconv", "-f", known, "-t", "UTF-8", name])
        if self.like:
            return f"it may be {self.like}, where it reads {quoted(self.sample)}: {command} > NEW_FILE"
        return f"{command} > NEW_FILE (WINDOWS-1252, WINDOWS-1250, WINDOWS-1251, GB18030, SHIFT_JIS, …)"


def reads_as_western(line: bytes) -> bool:
    """Whether a line reads better as Windows-1252 than in other encodings."""
    latin = _Latin()
    latin.add(line)
    return latin.is_latin() and latin.best() == "WINDOWS-1252"


def marked_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 where the first bytes say so: by a byte order mark, or by the zeros between ASCII letters."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    zeros = [place for place, byte in enumerate(head[:4]) if not byte]
    return {(1, 3): "UTF-16-LE", (0, 2): "UTF-16-BE", (1, 2, 3): "UTF-32-LE", (0, 1, 2): "UTF-32-BE"}.get(tuple(zeros))


def detect_encoding(chunks: Iterable[bytes]) -> Detected:
    """GB18030 or Windows-1252, if the whole content is valid there and reads like it; else none, as for UTF-8."""
    utf8, has_utf8, is_utf8 = codecs.getincrementaldecoder("utf-8")(), False, True
    chinese, latin = _East("gb18030"), _Latin()
    others = {name: _East(codec) for name, codec in _EAST.items()}
    first = b""  # the first line beyond ASCII
    for chunk in chunks:
        if is_utf8:
            try:
                has_utf8 |= not utf8.decode(chunk).isascii()
            except UnicodeDecodeError as error:
                is_utf8 = False
                if has_utf8 or not error.object[: error.start].isascii():
                    return Detected(damaged=True)
        if chunk.isascii():
            continue
        first = first or next(line for line in re.split(rb"[\r\n]+", chunk) if not line.isascii())
        latin.add(chunk)
        chinese.add(chunk)
        for other in others.values():
            other.add(chunk)
    if is_utf8 or not first:
        return Detected()
    if chinese.is_valid() and chinese.looks_right("GB18030"):
        return Detected(Guess.of("GB18030", _sample(first, "gb18030")))
    if latin.is_latin():
        if (best := latin.best()) == "WINDOWS-1252" and latin.is_certain():
            return Detected(Guess.of("Windows-1252", _sample(first, "cp1252")))
        return Detected(like=best, sample=_sample(first, _LATIN[best])) if best else Detected()
    likely = [name for name, one in others.items() if one.is_valid() and one.looks_right(name)]
    return Detected(like=likely[0], sample=_sample(first, _EAST[likely[0]])) if likely else Detected()


def _sample(line: bytes, codec: str) -> str:
    """The words around the first letter beyond ASCII."""
    text = line.decode(codec, "replace")
    place = next((place for place, mark in enumerate(text) if not mark.isascii()), 0)
    return text[max(0, place - 15) : place + 45].strip()


@dataclass
class _East:
    """Characters of an encoding of two bytes a character.

    Attributes:
        all: letters beyond ASCII.
        common, traditional: those of them that are frequent in Chinese.
    """

    codec: str
    all: int = 0
    common: int = 0
    traditional: int = 0
    kana: int = 0
    hangul: int = 0
    _broken: bool = False

    def __post_init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder(self.codec)()

    def add(self, chunk: bytes) -> None:
        """Count the characters of a piece."""
        if self._broken:
            return
        try:
            text = self._decoder.decode(chunk)
        except UnicodeDecodeError:
            self._broken = True
            return
        for mark, count in Counter(text).items():
            if mark.isalpha() and not mark.isascii():
                self.all += count
                self.common += count * (mark in letters.COMMON_CHINESE)
                self.traditional += count * (mark in letters.COMMON_TRADITIONAL)
                self.kana += count * (_KANA[0] <= mark <= _KANA[1])
                self.hangul += count * (_HANGUL[0] <= mark <= _HANGUL[1])

    def is_valid(self) -> bool:
        """Whether the whole content can be decoded."""
        try:
            self._decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
        return not self._broken and self.all > 0

    def looks_right(self, name: str) -> bool:
        """Whether the text reads as one in the language of the encoding."""
        if name == "GB18030":
            return self.common >= _COMMON * self.all and self.kana + self.hangul <= _FOREIGN * self.all
        found = {"CP949": self.hangul, "BIG5": self.traditional * 3}.get(name, self.kana * 2)
        return found >= 0.7 * self.all


@dataclass
class _Latin:
    """How well a content reads in each encoding of one byte a letter.

    Attributes:
        runs, alone: of bytes beyond ASCII, and those of one or two bytes.
        scores: by encoding; None where a byte is no letter of it.
        strong: lines that read better in another encoding than in Windows-1252, by far.
    """

    runs: int = 0
    alone: int = 0
    lines: int = 0
    scored: int = 0
    strong: int = 0
    num_letters: int = 0
    used: set[int] = field(default_factory=set)
    scores: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_LATIN, 0.0))

    def add(self, chunk: bytes) -> None:
        """Score the lines of a piece."""
        for run in _BEYOND.findall(chunk):
            self.runs, self.alone = self.runs + 1, self.alone + (len(run) <= 2)
            self.used.update(run)
        for line in self._chosen(chunk):
            self.scored += 1
            found = {name: letters.score(text) for name, text in self._texts(line)}
            self.num_letters += letters.num_letters(line.decode("latin-1"))
            for name in self.scores.keys() - found.keys():
                del self.scores[name]
            for name in self.scores:
                self.scores[name] += found[name]
            if found and max(found.values()) - found.get("WINDOWS-1252", -1e9) > _STRONG:
                self.strong += 1

    def _chosen(self, chunk: bytes) -> Iterator[bytes]:
        for line in re.split(rb"[\r\n]+", chunk):
            if not line.isascii():
                self.lines += 1
                if self.lines <= _LATER_LINES or self.lines % 32 == 0:
                    yield line

    def _texts(self, line: bytes) -> Iterator[tuple[str, str]]:
        for name in self.scores:
            try:
                text = line.decode(_LATIN[name])
            except UnicodeDecodeError:
                continue
            if not any("\x80" <= mark <= "\x9f" for mark in text):
                yield name, text

    def is_latin(self) -> bool:
        """Whether most letters beyond ASCII stand between ASCII letters."""
        return self.alone >= _ALONE * self.runs

    def best(self) -> str:
        """The encoding in which it reads best, the first of equal ones; none if it reads badly."""
        best = max(self.scores, key=lambda name: self.scores[name], default="")
        return best if best and self.scores[best] >= _LEAST * self.num_letters else ""

    def is_certain(self) -> bool:
        """Whether Windows-1252 is so much better than those that give another text."""
        mine = {byte: self._letter(byte, "WINDOWS-1252") for byte in self.used}
        if None in mine.values() or self.strong > _STRONG_SHARE * self.scored:
            return False
        others = [name for name in self.scores if any(self._letter(byte, name) != mine[byte] for byte in self.used)]
        return all(self.scores["WINDOWS-1252"] - self.scores[name] > _MARGIN for name in others)

    @staticmethod
    def _letter(byte: int, name: str) -> str | None:
        try:
            return bytes([byte]).decode(_LATIN[name])
        except UnicodeDecodeError:
            return None


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
