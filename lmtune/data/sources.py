"""Which files hold the data: a file, several, a folder of them, data sets on the Hub; a workbook is one source a sheet.

    find_files(["train.csv", "book.xlsx:Prices", "folder", DataSource(path="hub:user/name", split="train")])

What no reader takes (an archive, a web page, an old workbook) is named for what it is, which helps more than the JSON
error that its first byte would cause.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lmtune.config.schema import DataSource
from lmtune.data.workbooks import sheets_of
from lmtune.errors import DataError
from lmtune.io.text import format_list

# The reader of a file by the end of its name, and whether `.gz` and `.zst` may follow; any other name is JSON's.
KINDS: dict[str, tuple[str, bool]] = {
    ".jsonl": ("json", True), ".ndjson": ("json", True), ".json": ("json", True), ".csv": ("csv", True),
    ".tsv": ("csv", True), ".parquet": ("parquet", False), ".xlsx": ("xlsx", False), ".xlsm": ("xlsx", False),
}  # fmt: skip
PACKED = (".gz", ".zst")
_MARKS = {"xlsx": "!A", "parquet": ":row ", "hub": ":row "}
HUB = "hub:"
_ABOUT_DATA = re.compile(r"\.|(README|LICEN[CS]E|NOTICE|CITATION)\b|.*\.md$", re.IGNORECASE)
_MAGIC = (  # the first bytes, what they say, what to do
    (b"BZh", "compressed (bzip2)", "unpack it first: bunzip2"),
    (b"\xfd7zXZ\x00", "compressed (xz)", "unpack it first: unxz"),
    (b"\x1f\x8b", "compressed (gzip) twice", "unpack it first: gunzip"),
    (b"PK\x03\x04", "a zip archive or a workbook", "unpack it, or give a workbook's name the end .xlsx"),
    (b"\xd0\xcf\x11\xe0", "an old or encrypted Office document", "save it as .xlsx, without a password"),
    (b"PAR1", "a Parquet file", "give its name the end .parquet"),
    (b"ARROW1", "an Arrow file", "write it as Parquet or JSONL"),
    (b"version https://git-lfs", "a Git LFS pointer, not the rows", "fetch the file itself: git lfs pull"),
    (b"<", "a web page or XML, not the rows", "download the file itself"),
)
_NOT_READ = "only its own JSONL, JSON, CSV, TSV, Parquet and Excel files are"


Given = str | Path | DataSource


@dataclass(frozen=True)
class DataFile:
    """One source of rows: a file, a sheet of a workbook, or a split of a data set on the Hub.

    Attributes:
        name: what the user called it, for messages on the screen.
        portable_name: the same without the folders of this machine, for what is written to disk; no two are equal.
        kind: which of `READERS` reads it.
        part: the sheet or the split.
        entry: which of the paths that were given it belongs to.
    """

    path: Path
    name: str
    portable_name: str
    kind: str = "json"
    part: str = ""
    entry: int = 0

    @property
    def mark(self) -> str:
        """What stands between the name and a row's number in a place."""
        return _MARKS.get(self.kind, ":")

    def place(self, number: int, shown: bool = False) -> str:
        """Of a row, by the portable name or, `shown`, by the user's: `rows.csv:17`, `book.xlsx:Sheet1!A17`."""
        return f"{self.name if shown else self.portable_name}{self.mark}{number}"


def find_files(paths: Sequence[Given], split: str = "train") -> list[DataFile]:
    """The sources that `paths` name; a folder stands for the files that can be read in it, in the order of their names.

    A workbook stands for its sheets that hold cells and are not hidden; `book.xlsx:NAME` for one.

    Args:
        paths: files, folders, or `hub:NAME[:CONFIG][@REVISION]`.
        split: of data sets on the Hub for which none is named.

    Raises:
        DataError: with every path that is missing, no plain file, a folder without such files, or given twice.
    """
    found: list[tuple[int, Path, str, str]] = []  # entry, path, name, sheet or split
    problems: list[str] = []
    for entry, given in enumerate(paths):
        asked, own = (given.path, given.split) if isinstance(given, DataSource) else (os.fspath(given), None)
        if asked.startswith(HUB):
            part = own or split
            found.append((entry, Path(asked), f"{shown_name(asked).partition('@')[0]}/{part}", part))
            continue
        path, sheet = _with_sheet(_expanded(asked))
        name = shown_name(asked).removesuffix(f":{sheet}") if sheet else shown_name(asked)
        if own:
            problems.append(f"{name}: split: {own}; only a data set on the Hub has splits: hub:NAME")
        inside = [path / one for one in _entries(path) if is_read(one)]
        if os.path.isdir(path) and not inside:  # unlike pathlib's, also false for names that are too long
            problems.append(f"{name}: the folder holds no file to read (JSONL, JSON, CSV, TSV, Parquet or Excel)")
        found += [(entry, file, shown_name(file), "") for file in inside]
        if not os.path.isdir(path):
            found.append((entry, path, name, sheet))
    seen: set[tuple[str, str]] = set()
    for _, path, name, part in found:
        is_hub = str(path).startswith(HUB)
        if not is_hub and (problem := _unusable(path, name)):
            problems.append(f"{name}: {problem}")
        elif (real := (str(path) if is_hub else os.path.realpath(path), part)) in seen:
            problems.append(f"{name}: given twice")
        else:
            seen.add(real)
    if problems:
        raise DataError(f"these data files cannot be read:\n{format_list(problems)}")
    if not found:
        raise DataError("no data file given")
    names = dict.fromkeys(name for _, _, name, _ in found)
    portable = dict(zip(names, portable_names(list(names)), strict=True))
    return [source for entry, path, name, part in found
            for source in _sources_in(path, DataFile(path, name, portable[name], part=part, entry=entry))]  # fmt: skip


def _sources_in(path: Path, file: DataFile) -> list[DataFile]:
    """The sources in one file, which is named as a whole so far."""
    if str(path).startswith(HUB):
        return [replace(file, kind="hub")]
    kind = KINDS.get(_suffix(path.name), ("json", True))[0]
    if kind != "xlsx":
        return [replace(file, kind=kind)]
    sheets = [file.part] if file.part else sheets_of(path)[0] or [""]
    name, portable = file.name, file.portable_name
    return [
        replace(
            file, kind=kind, part=one, name=f"{name}:{one}".rstrip(":"), portable_name=f"{portable}:{one}".rstrip(":")
        )
        for one in sheets
    ]


def _with_sheet(path: Path) -> tuple[Path, str]:
    """`book.xlsx:Prices` as the workbook and the sheet."""
    found = re.fullmatch(r"(.*\.xls[xm]):(.+)", os.fspath(path), re.IGNORECASE | re.DOTALL)
    return (Path(found[1]), found[2]) if found and not os.path.exists(path) else (path, "")


def unread_entries(paths: Sequence[Given]) -> list[str]:
    """A warning for each folder or workbook of `paths` that holds more than what `find_files` takes from it."""
    warnings = []
    for given in paths:
        path = _expanded(given.path if isinstance(given, DataSource) else given)
        books = [path / name for name in _entries(path) if is_read(name)] if os.path.isdir(path) else [path]
        for book in books:
            visible, hidden = sheets_of(book) if KINDS.get(_suffix(book.name), ("", True))[0] == "xlsx" else ([], [])
            if visible and hidden:
                (name,) = portable_names([shown_name(book)])
                sheets = ", ".join(map(shown_name, hidden))
                first = f"{name}:{shown_name(hidden[0])}"
                warnings.append(f"{name}: hidden sheets are not read: {sheets}; show them, or name one: {first}")
        others = [name for name in _entries(path) if not is_read(name) and not _ABOUT_DATA.match(name)]
        if others:
            shown = ", ".join(shown_name(name) + "/" * os.path.isdir(path / name) for name in others[:5])
            more = f" and {len(others) - 5} more" if others[5:] else ""
            (name,) = portable_names([shown_name(path)])
            warnings.append(
                f"{name}: not read: {shown}{more}; of a folder, {_NOT_READ}: unpack, rename or move what should be"
            )
    return warnings


def foreign_kind(head: bytes) -> str | None:
    """What a file is that cannot hold rows of text, by its first bytes, and what to do; None if it can."""
    for magic, kind, advice in _MAGIC:
        if head.startswith(magic):
            return f"{kind}; {advice}"
    return None


def shown_name(name: str | Path) -> str:
    """A file's name as it may be printed: bytes that are not UTF-8 are replaced, control characters written out."""
    text = os.fsencode(name).decode("utf-8", "replace")
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text)


def _expanded(given: str | Path) -> Path:
    """`given` as a path, with `~` for the home folder, which a shell leaves as it is in `data.train=~/rows.jsonl`."""
    return Path(os.path.expanduser(given))


def is_read(name: str) -> bool:
    """Whether a file of this name in a folder is one of rows."""
    return bool(_suffix(name)) and not name.startswith((".", "~$"))  # what Excel puts beside an open workbook


def _suffix(name: str) -> str:
    """The end of a name that says which reader takes it, or nothing."""
    name = name.lower()
    plain = next((name.removesuffix(packed) for packed in PACKED if name.endswith(packed)), name)
    suffix = os.path.splitext(plain)[1]
    return suffix if suffix in KINDS and (plain == name or KINDS[suffix][1]) else ""


def _entries(folder: Path) -> list[str]:
    """What is in a folder, sorted; nothing where that may not be known, or there is none."""
    try:
        return sorted(os.listdir(folder))
    except (OSError, ValueError):
        return []


def portable_names(names: Sequence[str]) -> list[str]:
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
    if found := re.match(r"(?:hf://|https://huggingface\.co/)datasets/([\w.-]+(?:/[\w.-]+)?)", name):
        advice = f"a data set on the Hub is written hub:{found[1]}"
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", name):
        advice = "only local files and folders are read: download the rows first, and name the file"
    elif re.search(r"[*?\[{]", name):
        advice = "patterns are not read: name the files or their folder"
    elif near := difflib.get_close_matches(path.name, _entries(path.parent), n=1):
        advice = f"did you mean {shown_name(path.with_name(near[0]))}?"
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not _suffix(name):
        advice = f"if it is a data set on the Hub, write hub:{name}"
    else:
        advice = "only local files and folders are read"
    return f"no such file or folder; {advice}"
