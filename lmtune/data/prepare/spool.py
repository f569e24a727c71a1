"""Rows between two steps, on disk: memory does not grow with their number."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from lmtune.data.prepare.rows import Row


class Spool:
    """Rows in a file, read as often as needed."""

    def __init__(self, path: Path, rows: Iterable[Row]) -> None:
        """Write `rows` to the new file `path`, which only this process reads."""
        self._path, self._count = path, 0
        with open(path, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps([row.place, row.group, row.fields], ensure_ascii=False) + "\n")
                self._count += 1

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Row]:
        with open(self._path, "rb") as file:
            for line in file:
                yield _row(line)

    def offsets(self) -> Iterator[int]:
        """The byte at which each row begins."""
        place = 0
        with open(self._path, "rb") as file:
            for line in file:
                yield place
                place += len(line)

    def at(self, offset: int) -> Row:
        """The row that begins there."""
        with open(self._path, "rb") as file:
            file.seek(offset)
            return _row(file.readline())

    def remove(self) -> None:
        """Delete the file."""
        self._path.unlink(missing_ok=True)


def _row(line: bytes) -> Row:
    place, group, fields = json.loads(line)
    return Row(place, fields, group)
