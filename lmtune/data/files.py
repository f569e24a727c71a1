"""Which files hold the data: a file, several, or a folder of them, each looked at before it is read.

What cannot be rows of JSON in UTF-8 (a compressed file, a spreadsheet, UTF-16, a pipe) is named for what it is, which
helps more than the JSON error that its first byte would cause.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lmtune.errors import DataError, listed

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
        path = Path(given)
        if os.path.isdir(path):  # unlike pathlib's, also false for names that are too long
            names = _names_in(path)
            inside = sorted(path / n for n in names or () if n.lower().endswith(_SUFFIXES) and not n.startswith("."))
            if names is None:
                problems.append(f"{shown_name(given)}: the folder may not be listed; check its permissions")
            elif not inside:
                problems.append(f"{shown_name(given)}: the folder holds no *.jsonl or *.json file")
            found += [(p, str(p)) for p in inside]
        else:
            found.append((path, str(given)))
    seen: dict[str, str] = {}
    for path, name in found:
        problem = _unusable(path)
        if not problem:
            real = os.path.realpath(path)
            if real in seen:
                problem = "given twice" + (f" (it is {shown_name(seen[real])})" if seen[real] != name else "")
            seen.setdefault(real, name)
        if problem:
            problems.append(f"{shown_name(name)}: {problem}")
    if problems:
        raise DataError(f"these data files cannot be read:\n{listed(problems)}")
    if not found:
        raise DataError("no data file given")
    names = [shown_name(name) for _, name in found]
    portable = _portable_names(names)
    return [DataFile(path, name, short) for (path, _), name, short in zip(found, names, portable, strict=True)]


def shown_name(name: str | Path) -> str:
    """A file's name as it may be printed: bytes that are no UTF-8 are replaced, control characters written out."""
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


def _unusable(path: Path) -> str | None:
    """Why `path` is no readable plain file, or None."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        near = difflib.get_close_matches(path.name, _names_in(path.parent) or (), n=1)
        return "no such file" + (f"; did you mean {shown_name(path.with_name(near[0]))}?" if near else "")
    except (OSError, ValueError) as error:
        return f"cannot be opened ({getattr(error, 'strerror', None) or error})"
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        return f"is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file; write the rows to a file first"
    if not os.access(path, os.R_OK):
        return "may not be read; check its permissions"
    return None


def foreign_kind(head: bytes) -> str | None:
    """What a file is whose first bytes cannot begin rows of JSON, and what to do; None for what can."""
    for magic, kind, advice in _MAGIC:
        if head.startswith(magic):
            return f"{kind}; {advice}"
    if len(head) >= 4 and head[:4].count(0) == 2 and 0 in (head[0], head[1]) and head[0] != head[1]:
        return "UTF-16 without a byte order mark; save it as UTF-8"
    return None


def content_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        # What says that it is empty is not read: a file of the kernel's may wait for ever.
        while os.fstat(file.fileno()).st_size and (piece := file.read(1 << 20)):
            digest.update(piece)
    return digest.hexdigest()
