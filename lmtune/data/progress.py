"""How far reading a large file has come."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from lmtune.io.console import progress

_EVERY_ROWS = 2000


@contextlib.contextmanager
def row_progress(done: str) -> Iterator[Callable[[int], None]]:
    """A function that takes the number of rows so far; `done` is what happens to them, for example `reading`."""
    with progress(done, unit="rows") as shown:

        def show(num_rows: int) -> None:
            if num_rows % _EVERY_ROWS == 0:
                shown.at(num_rows)

        yield show
