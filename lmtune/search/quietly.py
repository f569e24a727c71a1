"""One of many runs of a process: its bar is shown, and a warning that an earlier one gave is not repeated."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from lmtune.io.console import quiet, warn


@contextlib.contextmanager
def one_run(seen: set[str]) -> Iterator[None]:
    """Print nothing inside the block but a bar, and behind it the warnings that are not in `seen` yet."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught, quiet(progress=True):
            yield
    finally:
        for one in caught:
            text = str(one.message)
            if issubclass(one.category, UserWarning) and text not in seen:
                seen.add(text)
                warn(text)
