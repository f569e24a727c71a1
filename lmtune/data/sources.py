"""Which files hold the data: a file, several, or a folder of them.

What cannot be rows of JSON in UTF-8 (a compressed file, a spreadsheet, UTF-16) is named for what it is, which helps
more than the JSON error that its first byte would cause.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lmtune.errors import DataError
from lmtune.io.text import format_list

_SUFFIXES = (".jsonl", ".json", ".ndjson")
_ABOUT_DATA = re.compile(r"\.|(README|LICEN[CS]E|NOTICE|CITATION)\b|.*\.md$", re.IGNORECASE)
_MAGIC = (  # the first bytes, what they say, what to do
    (b"\x1f\x8b", "compressed (gzip)", "unpack it first: gunzip"),
    (b"BZh", "compressed (bzip2)", "unpack it first: bunzip2"),
    (b"\xfd7zXZ\x00", "compressed (xz)", "unpack it first: unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed (zstd)", "unpack it first: unzstd"),
    (b"PK\x03\x04", "a zip archive or an Office document", "unpack it, or export it as JSONL"),
    (b"PAR1", "a Parquet file", "export it as JSONL"),
    (b"ARROW1", "an Arrow file", "export it as JSONL"),
    (b"version https://git-lfs", "a Git LFS pointer, not the rows", "fetch the file itself: git lfs pull"),
    (b"<", "a web page or XML, not the rows", "download the file itself"),
    (b"\xff\xfe", "UTF-16 or UTF-32", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 or UTF-32", "save it as UTF-8"),
)


@dataclass(frozen=True)
class DataFile:
    """One file of rows.

    Attributes:
        name: what the user called it, for messages on the screen.
        portable_name: the same without the folders of this machine, for what is written to disk; no two are equal.
    """

    path: Path
    name: str
    portable_name: str


def find_files(paths: Sequence[str | Path]) -> list[DataFile]:
    """The files that `paths` name; a folder stands for its *.jsonl, *.ndjson and *.json, in the order of their names.

    Raises:
        DataError: with every path that is missing, no plain file, a folder without such files, or given twice.
    """
    found: list[tuple[Path, str]] = []
    problems: list[str] = []
    for given in paths:
        path = _expanded(given)
        inside = [path / name for name in _entries(path) if _is_read(name)]
        if os.path.isdir(path) and not inside:  # unlike pathlib's, also false for names that are too long
            problems.append(f"{shown_name(given)}: the folder holds no *.jsonl, *.ndjson or *.json file to read")
        found += [(file, shown_name(file)) for file in inside]
        if not os.path.isdir(path):
            found.append((path, shown_name(given)))
    seen: set[str] = set()
    for path, name in found:
        if problem := _unusable(path, name):
            problems.append(f"{name}: {problem}")
        elif (real := os.path.realpath(path)) in seen:
            problems.append(f"{name}: given twice")
        else:
            seen.add(real)
    if problems:
        raise DataError(f"these data files cannot be read:\n{format_list(problems)}")
    if not found:
        raise DataError("no data file given")
    portable = _portable_names([name for _, name in found])
    return [DataFile(path, name, short) for (path, name), short in zip(found, portable, strict=True)]


def unread_entries(paths: Sequence[str | Path]) -> list[str]:
    """A warning for each folder of `paths` that holds more than the files that `find_files` takes from it."""
    warnings = []
    for given in paths:
        path = _expanded(given)
        others = [name for name in _entries(path) if not _is_read(name) and not _ABOUT_DATA.match(name)]
        if others:
            shown = ", ".join(shown_name(name) + "/" * os.path.isdir(path / name) for name in others[:5])
            more = f" and {len(others) - 5} more" if others[5:] else ""
            (name,) = _portable_names([shown_name(given)])
            warnings.append(
                f"{name}: not read: {shown}{more}; of a folder, only its own *.jsonl, *.ndjson and *.json files are: "
                "unpack, rename or move what should be"
            )
    return warnings


def foreign_kind(head: bytes, suffix: str = "") -> str | None:
    """What a file is that cannot hold rows of JSON, by its first bytes and its name, and what to do; None if it can."""
    for magic, kind, advice in _MAGIC:
        if head.startswith(magic):
            return f"{kind}; {advice}"
    if b"\0" in head[:4]:
        return "UTF-16 or UTF-32 without a byte order mark; save it as UTF-8"
    if suffix.lower() in (".csv", ".tsv"):
        return "a table (CSV); export it as JSONL, with the keys prompt and completion"
    return None


def shown_name(name: str | Path) -> str:
    """A file's name as it may be printed: bytes that are not UTF-8 are replaced, control characters written out."""
    text = os.fsencode(name).decode("utf-8", "replace")
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text)


def _expanded(given: str | Path) -> Path:
    """`given` as a path, with `~` for the home folder, which a shell leaves as it is in `data.train=~/rows.jsonl`."""
    return Path(os.path.expanduser(given))


def _is_read(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES) and not name.startswith(".")


def _entries(folder: Path) -> list[str]:
    """What is in a folder, sorted; nothing where that may not be known, or there is none."""
    try:
        return sorted(os.listdir(folder))
    except (OSError, ValueError):
        return []


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
    """Why `path`, given as `name`, is not a file to read, or None."""
    if os.path.isfile(path):
        return None
    if os.path.exists(path):
        return "not a regular file; write the rows to a file first"
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", name):
        advice = "only local files and folders are read: download the rows first, and name the file"
    elif re.search(r"[*?\[{]", name):
        advice = "patterns are not read: name the files or their folder"
    elif near := difflib.get_close_matches(path.name, _entries(path.parent), n=1):
        advice = f"did you mean {shown_name(path.with_name(near[0]))}?"
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.lower().endswith(_SUFFIXES):
        advice = f"a data set of the Hub is downloaded first: hf download --repo-type dataset {name} --local-dir FOLDER"
    else:
        advice = "only local files and folders are read"
    return f"no such file or folder; {advice}"
