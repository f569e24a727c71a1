"""How far reading a large file has come, shown on a terminal and nowhere else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from lmtune.console import err

_EVERY_ROWS = 2000


@contextlib.contextmanager
def row_progress(done: str) -> Iterator[Callable[[int], None]]:
    """A function that takes the number of rows so far; `done` is what happened to them, for example `read`."""
    if not err.is_terminal:
        yield lambda num_rows: None
        return
    with err.status("opening") as status:

        def show(num_rows: int) -> None:
            if num_rows % _EVERY_ROWS == 0:
                status.update(f"{num_rows:,} rows {done}")

        yield show
