"""Files that are whole or absent: staged writes, JSON, locks between processes, and a cache of folders.

Everything is written beside its place, flushed to the disk and renamed. A killed process or a full disk leaves the
earlier file or folder, the new one, or none; never half of one. What a crash leaves is called `.staging-NAME`,
`.earlier-NAME` or `.NAME.PID.tmp`, and the next write of NAME removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from lmtune.errors import ConfigError, LmtuneError

# A disk that is full, broken, or may not be written
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}

# --- files -----------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a file that holds `text`, whole or not at all."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with name_disk_errors(path), open(staged, "w", encoding="utf-8") as file:
            file.write(text)
            flush_to_disk(file)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Replace `path` by `tree` as indented JSON; NaN and infinity, which JSON does not have, are an error."""
    write_text(path, json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The object that JSON text holds; every string in it can be printed. ValueError says why it holds none."""
    try:
        tree = json.loads(text)
        json.dumps(tree, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("holds an unpaired surrogate") from None
    if not isinstance(tree, dict):
        raise ValueError(f"holds {type(tree).__name__}, not an object")
    return tree


def keep_lines(path: Path, keep: int) -> None:
    """Cut `path` after its first `keep` lines, and after a last line that a crash left half written."""
    if not path.is_file():
        return
    lines = path.read_bytes().split(b"\n")
    whole = lines[:-1][:keep]  # what follows the last newline is either empty or half a line
    write_text(path, b"".join(line + b"\n" for line in whole).decode("utf-8"))


def flush_to_disk(file: IO[Any]) -> None:
    """Flush `file` through Python's and the system's buffers."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable, as a rename needs after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def name_disk_errors(path: Path) -> Iterator[None]:
    """A full or read-only disk met in the block becomes an OSError that names the file, or else `path`.

    The system names no file when a disk is full, and libraries in Rust (safetensors, tokenizers) only write the
    system's number into their text.
    """
    try:
        yield
    except LmtuneError:
        raise
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        if number not in DISK_ERRORS:
            raise
        known = error.filename if isinstance(error, OSError) else None
        named = (os.fsdecode(known) if known else str(path)).replace(".staging-", "")
        final = re.sub(r"(^|/)\.([^/]+)\.\d+\.tmp$", r"\1\2", named)
        raise OSError(number, os.strerror(number), final) from error


@contextlib.contextmanager
def new_files(*targets: Path) -> Iterator[Path]:
    """An empty folder to write `targets` into, each under its name; when the block ends well each gets its place.

    They lie in one folder. What else is written into the folder is removed. ConfigError if one is there already, or
    another process is writing the first one now.
    """
    require_absent(*targets)
    staging = targets[0].with_name(f".staging-{targets[0].name}")
    with name_disk_errors(targets[0]):
        lock = open(staging.with_name(f".{targets[0].name}.lock"), "a", encoding="utf-8")  # noqa: SIM115
    try:
        if try_lock(lock) is False:
            raise ConfigError(f"{targets[0]}: another lmtune process is writing this file now; wait for it")
        shutil.rmtree(staging, ignore_errors=True)
        with name_disk_errors(targets[0]):
            staging.mkdir()
            yield staging
            require_absent(*targets)
            for target in targets[::-1]:  # the first last: who sees it has all
                with open(staging / target.name, "rb") as file:
                    flush_to_disk(file)
                os.replace(staging / target.name, target)
            sync_folder(targets[0].parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        Path(lock.name).unlink(missing_ok=True)
        lock.close()


def require_absent(*targets: Path) -> None:
    """Raise ConfigError if one of `targets` cannot be a new file."""
    for target in targets:
        if os.path.lexists(target):
            raise ConfigError(f"--output: {target} is there already, and is not replaced; give another --output")
        if not target.parent.is_dir():
            raise ConfigError(f"--output: {target.parent} is not a folder; make it, or give another --output")


# --- folders ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def staged_folder(target: Path, staging: Path) -> Iterator[Path]:
    """An empty folder `staging` to fill, which is renamed to `target` when the block ends well, and else removed.

    For a caller that keeps other processes from `staging`; `new_folder` does that itself.
    """
    try:
        with name_disk_errors(target):
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        yield staging
        replace_folder(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """As `staged_folder`; ConfigError if another process is writing `target` now.

    If the block fails, the folders above `target` that were made for it go too.
    """
    staging = target.with_name(f".staging-{target.name}")
    above = [folder for folder in staging.parents if not folder.exists()]
    with name_disk_errors(target):
        staging.parent.mkdir(parents=True, exist_ok=True)
        lock = open(staging.with_name(f".{target.name}.lock"), "a", encoding="utf-8")  # noqa: SIM115
    try:
        if try_lock(lock) is False:
            raise ConfigError(f"{target}: another lmtune process is writing this folder now; wait for it")
        try:
            with staged_folder(target, staging):
                yield staging
        finally:
            Path(lock.name).unlink(missing_ok=True)
            if not target.exists():
                with contextlib.suppress(OSError):  # another program has put something there
                    for folder in above:
                        folder.rmdir()
    finally:
        lock.close()


def replace_folder(staging: Path, target: Path) -> None:
    """Give the complete folder `staging` the name `target`; an earlier one goes whole, not file by file."""
    earlier = target.with_name(f".earlier-{target.name}")
    umask = os.umask(0)
    os.umask(umask)
    with name_disk_errors(target):
        for path in staging.rglob("*"):
            if path.is_file():
                path.chmod(0o666 & ~umask)  # safetensors lets only the owner read its files
                with path.open("rb") as file:
                    flush_to_disk(file)
        sync_folder(staging)
        shutil.rmtree(earlier, ignore_errors=True)
        if target.exists():
            target.rename(earlier)
        staging.rename(target)
        sync_folder(target.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a crash in the middle of a write has left in `folder`, for who may write there alone."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
    for path in (*folder.glob(".staging-*"), *folder.glob(".earlier-*")):
        shutil.rmtree(path, ignore_errors=True)


# --- locks -----------------------------------------------------------------------------------------------------------

_POLL_SECONDS = 0.1


class _HasDescriptor(Protocol):
    def fileno(self) -> int: ...


def try_lock(file: _HasDescriptor, shared: bool = False) -> bool | None:
    """Lock an open file for this process, until it is closed; the lock of a process that dies is free at once.

    Returns whether this process holds it: False if another does, None where the file system has no locks (Lustre
    without `-o flock`, some NFS). There nobody can wait, so callers treat None as a free lock.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def wait_for_lock(file: _HasDescriptor) -> None:
    """As `try_lock`, but wait for the process that holds it."""
    while try_lock(file) is False:
        time.sleep(_POLL_SECONDS)


# --- cache -----------------------------------------------------------------------------------------------------------

_MANIFEST = "manifest.json"
_SETTLED_NS = 2 * 10**9  # a file changed later than this before it was read may change again at the same time of change
_KNOWN_FILES = 1000


def cache_folder() -> Path:
    """`$LMTUNE_CACHE`, `$XDG_CACHE_HOME/lmtune` or `~/.cache/lmtune`; it may be deleted at any time."""
    if own := os.environ.get("LMTUNE_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lmtune"


def key_of(*parts: Any) -> str:
    """SHA-256, in hex, of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def get_or_build(folder: Path, key: str, build: Callable[[Path], None], keep: int | None = None) -> Path:
    """The cache entry `key`: a folder, filled by `build(empty folder)` unless it is there and intact.

    Processes that want the same entry at once wait for the one that builds it. Of `folder`, which holds all entries of
    a kind, `keep` stay: those used last and those in use. LmtuneError if the cache cannot be written.
    """
    entry = folder / key[:2] / key
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with open(entry.with_suffix(".lock"), "a", encoding="utf-8") as lock:
            wait_for_lock(lock)
            if not is_intact(entry):
                for left in entry.parent.glob(f".staging-{key[:8]}-*"):
                    shutil.rmtree(left, ignore_errors=True)
                # Named by its process: without locks several build at once, and the last rename stands
                with staged_folder(entry, entry.with_name(f".staging-{key[:8]}-{os.getpid()}")) as staging:
                    build(staging)
                    _write_manifest(staging)
            (entry / _MANIFEST).touch()  # used now
        if keep is not None:
            _prune(folder, keep)
    except OSError as error:
        raise LmtuneError(
            f"the cache {folder} cannot be used ({error.strerror or error}); free space there, or name another folder "
            "in LMTUNE_CACHE"
        ) from error
    return entry


def is_intact(entry: Path) -> bool:
    """Whether every file of the entry is as its manifest says.

    A file whose size and time of change are as they were is taken to be the same, as Git does; any other is read.
    """
    try:
        manifest = parse_object((entry / _MANIFEST).read_bytes())
        for name, digest in manifest["sha256"].items():
            now = _stamp(entry / name)
            is_same = manifest["stamps"][name] == now and now[1] + _SETTLED_NS // 40 < manifest["written_ns"]
            if not is_same and content_sha256(entry / name) != digest:
                return False
        return True
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def hold(entry: Path, owner: object) -> None:
    """Keep an entry from being deleted for newer ones, for as long as `owner` lives."""
    file = open(entry / _MANIFEST, "rb")  # noqa: SIM115
    weakref.finalize(owner, file.close)
    try_lock(file, shared=True)


def file_sha256(path: Path) -> str:
    """SHA-256, in hex, of a file's bytes; from the cache where the file has not changed since it was last asked for."""
    known = cache_folder() / "hashes" / f"{key_of(os.path.realpath(path))}.json"
    before = _identity(path)
    with contextlib.suppress(OSError, ValueError, KeyError):
        kept = parse_object(known.read_bytes())
        if kept["stamp"] == before:
            return str(kept["sha256"])
    digest = content_sha256(path)
    if _identity(path) == before and max(before[1:3]) + _SETTLED_NS < time.time_ns():
        with contextlib.suppress(OSError):  # a cache that cannot be written is said where it matters
            known.parent.mkdir(parents=True, exist_ok=True)
            write_json(known, {"stamp": before, "sha256": digest})
            files = sorted(known.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)
            for file in files[:-_KNOWN_FILES]:
                file.unlink(missing_ok=True)
    return digest


def content_sha256(path: Path) -> str:
    """SHA-256, in hex, of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(path: Path) -> list[int]:
    """Size and time of change of a file."""
    return _identity(path)[:2]


def _identity(path: Path) -> list[int]:
    """As `_stamp`, and what else changes with a file's content: nobody can set the second time."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]


def _write_manifest(folder: Path) -> None:
    files = sorted(folder.iterdir())
    tree = {
        "sha256": {path.name: content_sha256(path) for path in files},
        "stamps": {path.name: _stamp(path) for path in files},
        "written_ns": time.time_ns(),
    }
    write_json(folder / _MANIFEST, tree)


def _prune(folder: Path, count: int) -> None:
    """Delete all but the `count` entries used last and those that are held."""
    manifests = sorted(folder.glob(f"??/*/{_MANIFEST}"), key=lambda path: path.stat().st_mtime)
    for manifest in manifests[:-count]:
        with contextlib.suppress(FileNotFoundError), open(manifest, encoding="utf-8") as file:  # deleted by another
            if try_lock(file) is not False:
                manifest.unlink()
                shutil.rmtree(manifest.parent, ignore_errors=True)
