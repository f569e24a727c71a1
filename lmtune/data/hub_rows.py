"""Data sets on the Hub: `hub:NAME[:CONFIG][@REVISION]`, one split of it, through the `datasets` library.

The library downloads a data set once and keeps it as Arrow files, which are read through a memory map; offline it is
taken from there. What decides about a run is the content of these files, whatever the revision is called.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmtune.data.tables import Row, arrow_rows
from lmtune.errors import DataError
from lmtune.io.atomic import content_sha256, key_of
from lmtune.io.text import one_line

_NAME = re.compile(r"hub:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^@]+))?(?:@(?P<revision>.+))?")
_BATCH_ROWS = 1000


def hub_rows(path: Path, split: str, said: list[str]) -> Iterator[Row]:
    """The rows of a split, counted from 1.

    Raises:
        DataError: the data set cannot be had, or has no such split.
    """
    data = _load(str(path), split)
    if commit := _commit(data):
        said.append(f"commit {commit[:12]}")
    table, number = data.data.table, 0
    for batch in table.to_batches(_BATCH_ROWS):
        for row in arrow_rows(batch):
            number += 1
            yield number, None, row


def hub_sha256(path: Path, split: str) -> str:
    """Of the Arrow files that hold a split."""
    files = [str(file["filename"]) for file in _load(str(path), split).cache_files]
    return hashlib.sha256(key_of([content_sha256(Path(file)) for file in files], split).encode()).hexdigest()


def hub_bytes(path: Path, split: str) -> int:
    """Of the Arrow files that hold a split."""
    return sum(os.path.getsize(file["filename"]) for file in _load(str(path), split).cache_files)


@functools.lru_cache(maxsize=16)
def _load(given: str, split: str) -> Any:
    """The split, downloaded where it is not here yet or is newer."""
    found = _NAME.fullmatch(given)
    if found is None:
        raise DataError(f"{given}: not a data set on the Hub; expected hub:NAME[:CONFIG][@REVISION]")
    with _explained(given, split):
        from datasets import get_dataset_config_names, load_dataset

        try:
            return load_dataset(found["name"], found["config"], split=split, revision=found["revision"])
        except ValueError as error:
            if "Config name is missing" in str(error):
                names = ", ".join(get_dataset_config_names(found["name"], revision=found["revision"]))
                raise DataError(f"{given}: has several configurations ({names}); name one: hub:NAME:CONFIG") from None
            raise


@contextlib.contextmanager
def _explained(given: str, split: str) -> Iterator[None]:
    """What the library raises, as an error that says what to do."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = one_line(error)
        advice = "check its name, configuration and revision; if it is private, log in with `hf auth login`"
        if "Unknown split" in reason or "split" in type(error).__name__.lower():
            advice = f"name another one: {{path: {given}, split: …}}"
        elif "offline" in reason.lower() or isinstance(error, ConnectionError):
            advice = (
                "the Hub cannot be reached, and the data set was not loaded before; check the network and HF_ENDPOINT"
            )
        raise DataError(f"{given}: split {split} cannot be loaded: {reason}; {advice}") from error


def _commit(data: Any) -> str:
    """The commit on the Hub that the files are from, as far as the library kept it."""
    for url in data.info.download_checksums or {}:
        if found := re.search(r"@([0-9a-f]{40})/", str(url)):
            return found[1]
    return ""
