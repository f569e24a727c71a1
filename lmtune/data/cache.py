"""Results that depend on content alone, kept in `$LMTUNE_CACHE`, `$XDG_CACHE_HOME/lmtune` or `~/.cache/lmtune`.

An entry is a folder named by the hash of all it depends on. It is built under another name and renamed when complete;
its manifest holds the size and SHA-256 of each file, so a damaged entry is found and built again. Processes that want
the same entry at once wait for the one that builds it. The folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lmtune import locks
from lmtune.data.files import content_sha256
from lmtune.errors import LmtuneError
from lmtune.writing import flush_to_disk, sync_folder, write_json

_MANIFEST = "manifest.json"
_TURN_SECONDS = 1800.0  # 70 billion weights take a CPU longer; then the others begin as well


def cache_folder() -> Path:
    """The folder of all entries; need not exist."""
    if own := os.environ.get("LMTUNE_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lmtune"


def key_of(*parts: Any) -> str:
    """SHA-256, in hex, of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def cached(folder: Path, key: str, build: Callable[[Path], None], keep: int | None = None) -> Path:
    """The folder of the entry `key`, built by `build(empty folder)` unless it is there and whole.

    Args:
        folder: of all entries of this kind.
        key: of this one.
        build: fills an empty folder.
        keep: how many entries of `folder` may stay, the most recently used; None is all.

    Raises:
        LmtuneError: the cache cannot be written.
        Exception: whatever `build` raises; nothing is kept then.
    """
    entry = folder / key[:2] / key
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with _locked(entry.with_suffix(".lock")):
            if not is_whole(entry):
                _build(entry, build)
            (entry / _MANIFEST).touch()  # used now
        if keep is not None:
            _keep_newest(folder, keep)
    except OSError as error:
        raise LmtuneError(
            f"the cache {folder} cannot be used ({error.strerror or error}); free space there, or name another folder "
            "in LMTUNE_CACHE"
        ) from error
    return entry


def found(folder: Path, key: str) -> Path | None:
    """The folder of the entry `key` if it is there and whole."""
    entry = folder / key[:2] / key
    if not is_whole(entry):
        return None
    with contextlib.suppress(OSError):  # a cache that may be read but not written
        (entry / _MANIFEST).touch()
    return entry


@contextlib.contextmanager
def turn(folder: Path, key: str) -> Iterator[bool]:
    """Of the processes that would make the entry `key` at once, one comes first and the others wait until it is done.

    The wait also ends where that process fails, dies, or hangs for half an hour: nobody is in a meeting of all
    processes here, whose own limit would end it. Where there is no such lock, each comes first.

    Yields:
        Whether this process is the first; one that has waited holds up nobody, and finds the entry if it was made.
    """
    entry = folder / key[:2] / key
    with contextlib.ExitStack() as held:
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(open(entry.with_suffix(".turn"), "a", encoding="utf-8"))
            is_held, waited = locks.wait_for(file, seconds=_TURN_SECONDS)
            first = is_held and not waited
        except OSError:
            first = True
        if not first:
            held.close()
        yield first


def is_whole(entry: Path) -> bool:
    """Whether every file of the entry is as its manifest says."""
    try:
        sums = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))["sha256"]
        return all(content_sha256(entry / name) == digest for name, digest in sums.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _build(entry: Path, build: Callable[[Path], None]) -> None:
    for left in entry.parent.glob(f".{entry.name[:8]}-*"):  # by a process that was killed while it held the lock
        shutil.rmtree(left, ignore_errors=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{entry.name[:8]}-", dir=entry.parent))
    try:
        build(staged)
        sums = {}
        for path in sorted(staged.iterdir()):
            with open(path, "rb") as file:
                flush_to_disk(file)
            sums[path.name] = content_sha256(path)
        write_json(staged / _MANIFEST, {"sha256": sums})
        shutil.rmtree(entry, ignore_errors=True)  # a damaged one
        os.rename(staged, entry)
        sync_folder(entry.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _keep_newest(folder: Path, count: int) -> None:
    """Delete all but the `count` entries used last; a process that has one open keeps what it has mapped."""
    manifests = sorted(folder.glob(f"??/*/{_MANIFEST}"), key=lambda path: path.stat().st_mtime)
    for manifest in manifests[:-count]:
        manifest.unlink(missing_ok=True)
        shutil.rmtree(manifest.parent, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; where the system has no such locks, each builds its own and the last rename stands."""
    with open(path, "a", encoding="utf-8") as file:
        locks.wait_for(file)
        yield
