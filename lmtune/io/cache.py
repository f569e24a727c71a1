"""Results that depend on content alone, kept in `$LMTUNE_CACHE`, `$XDG_CACHE_HOME/lmtune` or `~/.cache/lmtune`.

An entry is a folder named by the hash of all it depends on. It is built under another name and renamed when complete;
its manifest holds each file's size, time of change and SHA-256. A file whose size and time are as they were is taken
to be whole, as Git does; any other is read, and an entry that is damaged is built again. Processes that want the same
entry at once wait for the one that builds it. Of each kind the entries used last are kept, and those in use. The folder
may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lmtune.errors import LmtuneError
from lmtune.io import locks
from lmtune.io.atomic import flush_to_disk, sync_folder, write_json

_MANIFEST = "manifest.json"
_SETTLED_NS = 2 * 10**9  # a file changed later than this before it was read may change again at the same time of change
_KNOWN_FILES = 1000
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
    """Whether every file of the entry is as its manifest says; reads those only whose size or time differ."""
    try:
        manifest = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))
        stamps, written = manifest.get("stamps", {}), manifest.get("written_ns", 0)
        for name, digest in manifest["sha256"].items():
            is_same = stamps.get(name) == (now := _stamp(entry / name)) and now[1] + _SETTLED_NS // 40 < written
            if not is_same and content_sha256(entry / name) != digest:
                return False
        return True
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def hold(entry: Path, owner: object) -> None:
    """Keep an entry from being deleted for newer ones, for as long as `owner` lives."""
    descriptor = os.open(entry / _MANIFEST, os.O_RDONLY)
    weakref.finalize(owner, os.close, descriptor)
    locks.take(descriptor, shared=True)


def file_sha256(path: Path) -> str:
    """SHA-256, in hex, of a file's bytes; from the cache where the file has not changed since it was last asked for."""
    known = cache_folder() / "hashes" / f"{key_of(os.path.realpath(path))}.json"
    stamp = _identity(path)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(known.read_text(encoding="utf-8"))
        if kept["stamp"] == stamp:
            return str(kept["sha256"])
    digest = content_sha256(path)
    if _identity(path) == stamp and max(stamp[1:3]) + _SETTLED_NS < time.time_ns():
        with contextlib.suppress(OSError):  # a cache that cannot be written is said where it matters
            known.parent.mkdir(parents=True, exist_ok=True)
            write_json(known, {"stamp": stamp, "sha256": digest})
            files = sorted(known.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)
            for file in files[:-_KNOWN_FILES]:
                file.unlink(missing_ok=True)
    return digest


def _stamp(path: Path) -> list[int]:
    """Size and time of change of a file."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def _identity(path: Path) -> list[int]:
    """As `_stamp`, and what else changes with a file's content: nobody can set the second time."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]


def _build(entry: Path, build: Callable[[Path], None]) -> None:
    for left in entry.parent.glob(f".{entry.name[:8]}-*"):  # by a process that was killed while it held the lock
        shutil.rmtree(left, ignore_errors=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{entry.name[:8]}-", dir=entry.parent))
    try:
        build(staged)
        sums, stamps = {}, {}
        for path in sorted(staged.iterdir()):
            with open(path, "rb") as file:
                flush_to_disk(file)
            stamps[path.name], sums[path.name] = _stamp(path), content_sha256(path)
        write_json(staged / _MANIFEST, {"sha256": sums, "stamps": stamps, "written_ns": time.time_ns()})
        shutil.rmtree(entry, ignore_errors=True)  # a damaged one
        os.rename(staged, entry)
        sync_folder(entry.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _keep_newest(folder: Path, count: int) -> None:
    """Delete all but the `count` entries used last and those that are held."""
    manifests = sorted(folder.glob(f"??/*/{_MANIFEST}"), key=lambda path: path.stat().st_mtime)
    for manifest in manifests[:-count]:
        with contextlib.suppress(FileNotFoundError), open(manifest, encoding="utf-8") as file:  # somebody else's turn
            if locks.take(file):
                manifest.unlink()
                shutil.rmtree(manifest.parent, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; where the system has no such locks, each builds its own and the last rename stands."""
    with open(path, "a", encoding="utf-8") as file:
        locks.wait_for(file)
        yield


def content_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        # What says that it is empty is not read: a file of the kernel's may wait for ever.
        while os.fstat(file.fileno()).st_size and (piece := file.read(1 << 20)):
            digest.update(piece)
    return digest.hexdigest()
