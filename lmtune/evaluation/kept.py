"""JSON objects in a file that grows by one line at a time, so that work which is stopped costs nothing twice.

kept = KeptLines(Path("votes.jsonl"))
kept.lines, kept.add({"row": "a.jsonl:1", "vote": "first"})
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmtune.errors import DataError
from lmtune.io.atomic import flush_to_disk, keep_lines, name_disk_errors, parse_object


class KeptLines:
    """The objects of a file, one a line; half a line at its end, which a killed process leaves, is cut off.

    Attributes:
        path: of the file; it is made with the first line.
        lines: its objects.
    """

    def __init__(self, path: Path) -> None:
        """DataError if the file holds something else."""
        self.path, self.lines, self._lock = path, list[dict[str, Any]](), threading.Lock()
        if not path.is_file():
            return
        keep_lines(path, sys.maxsize)
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                self.lines.append(parse_object(line))
            except ValueError as error:
                raise DataError(f"{path}:{number}: {error}; restore the file, or give another --output") from None

    def add(self, tree: Mapping[str, Any]) -> None:
        """Append one object, and flush it to the disk; from any thread."""
        line = json.dumps(tree, ensure_ascii=False) + "\n"
        with self._lock, name_disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line)
                flush_to_disk(file)
            self.lines.append(dict(tree))
