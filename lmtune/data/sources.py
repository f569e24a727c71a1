"""Which files hold the data: a file, several, or a folder of them, each looked at before it is read.

What cannot be rows of JSON in UTF-8 (a compressed file, a spreadsheet, UTF-16, a pipe) is named for what it is, which
helps more than the JSON error that its first byte would cause.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import glob
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lmtune.errors import DataError
from lmtune.io.text import format_list

_SUFFIXES = (".jsonl", ".json", ".ndjson")
_MAGIC = (  # the first bytes, what they say, what to do
    (b"\x1f\x8b", "compressed (gzip)", "unpack it first: gunzip"),
    (b"BZh", "compressed (bzip2)", "unpack it first: bunzip2"),
    (b"\xfd7zXZ\x00", "compressed (xz)", "unpack it first: unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed (zstd)", "unpack it first: unzstd"),
    (b"PK\x03\x04", "a zip archive or an Office document", "unpack it, or export it as JSONL"),
    (b"PAR1", "a Parquet file", "export it as JSONL"),
    (b"ARROW1", "an Arrow file", "export it as JSONL"),
    (b"%PDF", "a PDF", "export its rows as JSONL"),
    (b"version https://git-lfs", "a Git LFS pointer, not the rows", "fetch the file itself: git lfs pull"),
    (b"<!DOCTYPE", "a web page, not the rows", "download the file itself"),
    (b"<!doctype", "a web page, not the rows", "download the file itself"),
    (b"<html", "a web page, not the rows", "download the file itself"),
    (b"<?xml", "XML, not rows of JSON", "download the file itself, or export its rows as JSONL"),
    (b"\xff\xfe\x00\x00", "UTF-32", "save it as UTF-8"),
    (b"\x00\x00\xfe\xff", "UTF-32", "save it as UTF-8"),
    (b"\xff\xfe", "UTF-16", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16", "save it as UTF-8"),
)


@dataclass(frozen=True)
class DataFile:
    """One file of rows.

    Attributes:
        name: what the user called it, for messages on the screen; always text of one line that a terminal only shows.
        portable_name: the same without the folders of this machine, for what is written to disk; no two are equal.
    """

    path: Path
    name: str
    portable_name: str


def find_files(paths: Sequence[str | Path]) -> list[DataFile]:
    """The files that `paths` name; a folder stands for its *.jsonl, *.ndjson and *.json, in the order of their names.

    Raises:
        DataError: with every path that is missing, no plain file, an empty folder, or given twice.
    """
    found: list[tuple[Path, str]] = []
    problems: list[str] = []
    for given in paths:
        path = _expanded(given)
        if os.path.isdir(path):  # unlike pathlib's, also false for names that are too long
            names = _names_in(path)
            inside = sorted(path / name for name in names or () if _is_read(name))
            if names is None:
                problems.append(f"{shown_name(given)}: the folder may not be listed; check its permissions")
            elif not inside:
                other = _some_names(_unread(path, names))
                holds = f"; it holds {other}: unpack, move or export it" if other else ""
                problems.append(f"{shown_name(given)}: the folder holds no *.jsonl or *.json file{holds}")
            found += [(p, str(p)) for p in inside]
        else:
            found.append((path, str(given)))
    seen: dict[str, str] = {}
    for path, name in found:
        problem = _unusable(path, name)
        if not problem:
            real = os.path.realpath(path)
            if real in seen:
                problem = "given twice" + (f" (it is {shown_name(seen[real])})" if seen[real] != name else "")
            seen.setdefault(real, name)
        if problem:
            problems.append(f"{shown_name(name)}: {problem}")
    if problems:
        raise DataError(f"these data files cannot be read:\n{format_list(problems)}")
    if not found:
        raise DataError("no data file given")
    names = [shown_name(name) for _, name in found]
    portable = _portable_names(names)
    return [DataFile(path, name, short) for (path, _), name, short in zip(found, names, portable, strict=True)]


def unread_entries(paths: Sequence[str | Path]) -> list[str]:
    """One warning for each folder of `paths` that holds more than the files that `find_files` takes from it."""
    warnings = []
    for given in paths:
        path = _expanded(given)
        others = _unread(path, _names_in(path) or []) if os.path.isdir(path) else []
        if others:
            (name,) = _portable_names([shown_name(given)])
            entries = "1 entry is" if len(others) == 1 else f"{len(others)} entries are"
            warnings.append(
                f"{name}: {entries} not read: {_some_names(others)}; of a folder, only its own *.jsonl, *.ndjson and "
                "*.json files are: unpack, rename or move what should be"
            )
    return warnings


def _expanded(given: str | Path) -> Path:
    """`given` as a path, with `~` for the home folder, which a shell leaves as it is in `data.train=~/rows.jsonl`."""
    try:
        return Path(given).expanduser()
    except RuntimeError:  # no such user
        return Path(given)


def _is_read(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES) and not name.startswith(".")


def _unread(folder: Path, names: Sequence[str]) -> list[str]:
    """Entries that are not read though they may hold rows, folders with a slash behind them."""
    others = [name for name in sorted(names) if not (_is_read(name) or name.startswith(".") or _ABOUT_DATA.match(name))]
    return [f"{name}/" if os.path.isdir(folder / name) else name for name in others]


_ABOUT_DATA = re.compile(r"(README|LICEN[CS]E|NOTICE|CITATION)\b|.*\.md$", re.IGNORECASE)


def _some_names(names: Sequence[str]) -> str:
    return ", ".join(shown_name(name) for name in names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")


def shown_name(name: str | Path) -> str:
    """A file's name as it may be printed: bytes that are not UTF-8 are replaced, control characters written out."""
    text = os.fsencode(name).decode("utf-8", "replace")
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text)


def _names_in(folder: Path) -> list[str] | None:
    """What is in a folder, or None if that may not be known."""
    try:
        return os.listdir(folder)
    except OSError:
        return None


def _portable_names(names: Sequence[str]) -> list[str]:
    """Relative names stay; an absolute one is shortened to its place in the working folder, else to its last part."""
    short: list[str] = []
    for name in names:
        if os.path.isabs(name):
            inside = os.path.relpath(name)
            name = os.path.basename(name) if inside.startswith(os.pardir) else inside
        number, unique = 1, name
        while unique in short:
            number += 1
            unique = f"{name} ({number})"
        short.append(unique)
    return short


def _unusable(path: Path, name: str) -> str | None:
    """Why `path`, given as `name`, is not a readable file, or None."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        near = difflib.get_close_matches(path.name, _names_in(path.parent) or (), n=1)
        if near and not _ELSEWHERE.search(name):
            return f"no such file; did you mean {shown_name(path.with_name(near[0]))}?"
        return f"no such file or folder{_not_local(name)}"
    except (OSError, ValueError) as error:
        return f"cannot be opened ({getattr(error, 'strerror', None) or error})"
    if not stat.S_ISREG(mode):
        return "not a regular file; write the rows to a file first"
    if not os.access(path, os.R_OK):
        return "may not be read; check its permissions"
    return None


_ADDRESS, _PATTERN = r"[A-Za-z][A-Za-z0-9+.-]+:", r"[*?\[{]"
_ELSEWHERE = re.compile(f"^{_ADDRESS}|{_PATTERN}")


def _not_local(name: str) -> str:
    """What to do about a name of something that is not a local file; else nothing."""
    only = "; only local files and folders are read"
    if re.match(_ADDRESS, name):
        return f"{only}: download the rows first, and name the file"
    if re.search(_PATTERN, name):
        with contextlib.suppress(OSError, ValueError):
            if matches := sorted(islice(glob.iglob(name), 6)):
                return f"{only}, no patterns: name the files or their folder (it matches {_some_names(matches)})"
        return f"{only}, no patterns: name the files or their folder"
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.lower().endswith(_SUFFIXES):
        hub = "hf download --repo-type dataset " + name
        return f"{only}: a data set of the Hub is downloaded first ({hub} --local-dir FOLDER) and written as JSONL"
    return only


def foreign_kind(head: bytes, suffix: str = "") -> str | None:
    """What a file is that cannot hold rows of JSON, by its first bytes and its name, and what to do; None if it can."""
    for magic, kind, advice in _MAGIC:
        if head.startswith(magic):
            return f"{kind}; {advice}"
    if len(head) >= 4 and head[:4].count(0) == 2 and 0 in (head[0], head[1]) and head[0] != head[1]:
        return "UTF-16 without a byte order mark; save it as UTF-8"
    if suffix.lower() in (".csv", ".tsv") and head.strip()[:1] not in (b"{", b"["):
        return "a table (CSV); export it as JSONL, with the keys prompt and completion"
    return None


# The hundred most common characters of Chinese, with some of questions: a third of any text, and of nothing else.
_COMMON_HANZI = frozenset(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去法学如都同现当没动"
    "面起看定天分还进好小部其些主样理心本前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很最重并物手应战向头"
    "请吗什怎谢您今号单货"
)


def encoding_advice(sample: bytes) -> str:
    """` (it looks like …: iconv …)` for the first bytes of a file that is not UTF-8; empty where nothing can be said.

    Lines of good UTF-8 beyond ASCII speak for a damaged file, not for another encoding.
    """
    if any(_is_utf8(line) and not line.isascii() for line in sample.splitlines()):
        return ""
    if _is_chinese(sample):
        return " (it looks like GB18030 or GBK: iconv -f GB18030 -t UTF-8 OLD > NEW)"
    if _is_western(sample):
        return " (it looks like Windows-1252 or Latin-1: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW)"
    return ""


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_chinese(sample: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(sample)
    except UnicodeDecodeError:
        return False
    hanzi = [mark for mark in text if "\u4e00" <= mark <= "\u9fff"]
    return sum(mark in _COMMON_HANZI for mark in hanzi) > 0.1 * len(hanzi)


def _is_western(sample: bytes) -> bool:
    """Whether bytes beyond ASCII stand alone between letters, as accents and quotation marks do."""
    high = [index for index, byte in enumerate(sample) if byte > 127]
    alone = [i for i in high if not (i and sample[i - 1] > 127) and not (i + 1 < len(sample) and sample[i + 1] > 127)]
    return len(alone) > 0.7 * len(high)
