"""Rows between two steps, on disk: memory does not grow with their number."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

from lmtune.data.prepare.rows import Row


class Spool:
    """Rows in a file, read as often as needed; a line holds the fields, a tab, and where they are from."""

    def __init__(self, path: Path, rows: Iterable[Row]) -> None:
        """Write `rows` to the new file `path`, which only this process reads."""
        self._path, self._count = path, 0
        encode = json.JSONEncoder(ensure_ascii=False).encode
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(f"{encode(row.fields)}\t{encode([row.place, row.group])}\n")
                self._count += 1

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Row]:
        with open(self._path, "rb") as file:
            for line in file:
                yield _row(line)

    def contents(self) -> Iterator[int]:
        """64 bits of each row, equal for rows of equal fields."""
        with open(self._path, "rb") as file:
            for line in file:
                yield int.from_bytes(blake2b(line[: line.index(b"\t")], digest_size=8).digest(), "little")

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
    fields, _, origin = line.decode().partition("\t")  # JSON holds no tab
    place, group = json.loads(origin)
    return Row(place, json.loads(fields), group)
