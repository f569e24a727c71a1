"""Data sets on the Hub: `hub:NAME[:CONFIG][@REVISION]`, one split of it, through the `datasets` library.

The library says which files a split has. JSON and CSV files are then read by our own readers, because the library turns
`2026-03-05` into a point in time and `007` into 7. Of all others it makes Arrow files, which are read through a memory
map. What was downloaded once is there offline, too. A run depends on the content, whatever the revision is called.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmtune.data.tables import Row, arrow_rows, class_names
from lmtune.errors import DataError
from lmtune.io.atomic import cache_folder, content_sha256, key_of, write_json
from lmtune.io.text import one_line

_NAME = re.compile(r"hub:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^@/]+))?(?:@(?P<revision>.+))?")
_FILE = re.compile(r"hf://datasets/(?P<name>.+)@(?P<commit>[0-9a-f]{40})/(?P<path>.+)")
_BATCH_ROWS = 1000


@dataclass(frozen=True)
class _Split:
    """What a split is read from: `files` by a reader of ours, or `data`, a Dataset."""

    files: tuple[Path, ...]
    commit: str
    data: Any = None

    @property
    def stored(self) -> list[Path]:
        """The files that hold it."""
        return list(self.files) if self.data is None else [Path(file["filename"]) for file in self.data.cache_files]


def hub_rows(
    path: Path, split: str, said: list[str], read_file: Callable[[Path, list[str]], Iterator[Row]]
) -> Iterator[Row]:  # fmt: skip
    """The rows of a split, counted from 1; `read_file` reads its JSON and CSV files.

    Raises:
        DataError: the data set cannot be had, or has no such split.
    """
    found, number = _load(str(path), split), 0
    if found.commit:
        said.append(f"commit {found.commit[:12]}")
    for file in found.files:
        of_file: list[str] = []
        for _, _, row in read_file(file, of_file):
            number += 1
            yield number, None, row
        said += [one for one in of_file if one not in said]
    if found.data is None:
        return
    names = class_names(found.data.features.to_dict(), said)
    for batch in found.data.data.table.to_batches(_BATCH_ROWS):
        for row in arrow_rows(batch, said, names):
            number += 1
            yield number, None, row


def hub_sha256(path: Path, split: str) -> str:
    """Of the files that hold a split."""
    contents = [content_sha256(file) for file in _load(str(path), split).stored]
    return hashlib.sha256(key_of(contents, split).encode()).hexdigest()


def hub_bytes(path: Path, split: str) -> int:
    """Of the files that hold a split."""
    return sum(map(os.path.getsize, _load(str(path), split).stored))


@functools.lru_cache(maxsize=16)
def _load(given: str, split: str) -> _Split:
    """The split, downloaded where it is not here yet or is newer; offline as it was last."""
    found = _NAME.fullmatch(given)
    if found is None:
        raise DataError(f"{given}: not a data set on the Hub; expected hub:NAME[:CONFIG][@REVISION]")
    with _explained(given, split):
        import datasets
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of its HTTP library
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        datasets.disable_progress_bars()
        disable_progress_bars()
        datasets.logging.set_verbosity_error()
        note = cache_folder() / "hub" / f"{key_of(given, split, os.environ.get('HF_HOME'))}.json"
        try:
            urls = _own_files(found, split)
        except (ConnectionError, HTTPError):
            if not note.is_file():
                raise
            urls = json.loads(note.read_text(encoding="utf-8"))["files"]
            return _downloaded(urls, offline=True)
        if urls:
            note.parent.mkdir(parents=True, exist_ok=True)
            write_json(note, {"files": urls})
            return _downloaded(urls)
        data = datasets.load_dataset(found["name"], found["config"], split=split, revision=found["revision"])
        return _Split((), _commit(data), data)


def _own_files(found: re.Match[str], split: str) -> list[str]:
    """The JSON or CSV files of a split, as `hf://…`; none if the library is to read it.

    Raises:
        ConnectionError: the Hub is not reached.
        DataError: there is no such split, or the configuration must be named.
    """
    import datasets

    try:
        builder = datasets.load_dataset_builder(found["name"], found["config"], revision=found["revision"])
    except ValueError as error:
        if "Config name is missing" not in str(error):
            raise
        names = ", ".join(datasets.get_dataset_config_names(found["name"], revision=found["revision"]))
        raise DataError(f"{found[0]}: has several configurations ({names}); name one: hub:NAME:CONFIG") from None
    config, kind = builder.config, type(builder).__module__.rpartition(".")[2]
    if kind == "cache":  # what the library takes when the Hub is not reached
        raise ConnectionError("the Hub is not reached")
    files: Mapping[str, Any] = config.data_files or {}
    if files and split not in files:
        raise DataError(
            f"{found[0]}: no split {split}; it has {', '.join(map(str, files))}; name one: "
            f"{{path: {found[0]}, split: …}}"
        )
    plain = all(getattr(config, name, None) is None for name in ("field", "names", "column_names", "skiprows"))
    urls = [str(url) for url in files.get(split, ())]
    own = kind in ("json", "csv") and plain and all(_FILE.fullmatch(url) for url in urls)
    return urls if own and not any(url.endswith((".zip", ".tar", ".bz2", ".xz", ".7z")) for url in urls) else []


def _downloaded(urls: list[str], offline: bool = False) -> _Split:
    """The files of a split in the Hub's cache."""
    from huggingface_hub import hf_hub_download

    parts = [found for found in map(_FILE.fullmatch, urls) if found is not None]
    files = tuple(
        Path(
            hf_hub_download(
                part["name"], part["path"], repo_type="dataset", revision=part["commit"], local_files_only=offline
            )
        )
        for part in parts
    )
    return _Split(files, parts[0]["commit"] if parts else "")


@contextlib.contextmanager
def _explained(given: str, split: str) -> Iterator[None]:
    """What the library raises, as an error that says what to do."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        advice = "check its name, configuration and revision; if it is private, log in with `hf auth login`"
        if isinstance(error, ConnectionError):
            advice = "it was not loaded before, and the Hub cannot be reached; check the network and HF_ENDPOINT"
        raise DataError(f"{given}: split {split} cannot be loaded: {one_line(error).rstrip('.')}; {advice}") from error


def _commit(data: Any) -> str:
    """The commit on the Hub that the data are from, by which the library names its folder."""
    found = re.findall(r"/([0-9a-f]{40})/", "".join(str(file["filename"]) for file in data.cache_files))
    return str(found[0]) if found else ""
