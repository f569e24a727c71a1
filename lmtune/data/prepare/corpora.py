"""Which files `prepare` is given, and as what each is read.

A table of recognizers says, by a file's name and first bytes, whether it is a corpus as it is published or a chat as a
program exports it. Any other file holds rows as training reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmtune.data.prepare.settings import Settings
from lmtune.data.readers import read_rows
from lmtune.data.sources import DataFile, find_files


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row before it is parsed: `fields` is a JSON value, or the `RowFault` in its place."""

    number: int
    fields: Any
    group: str = ""


@dataclass
class Source:
    """Files that are read together.

    Attributes:
        name: in the places of rows.
        read_as: what they are taken for.
        notes: what was left out, filled while `rows` is read.
    """

    name: str
    files: Sequence[DataFile]
    read_as: str
    rows: Iterator[RawRow]
    notes: list[str] = field(default_factory=list)


def find_sources(paths: Sequence[str], settings: Settings) -> Iterator[Source]:
    """What `paths` (files or folders) hold, in order.

    Raises:
        DataError: a path cannot be read.
    """
    for file in find_files(paths):
        rows = (RawRow(line, row) for line, _, row in read_rows(file))
        yield Source(file.portable_name, [file], "rows", rows)
