"""How files and folders are written so that they are whole: beside their place, flushed to the disk, and renamed.

A program that is killed, or a disk that is full, leaves what was there before, the new file or folder, or none, but
never half of one. What a crash leaves half written is called `.staging-NAME` or `.NAME.PID.tmp`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from lmtune.errors import ConfigError, LmtuneError
from lmtune.io import locks

# A disk that is full, broken, or must not be written
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a file that holds `text`, whole or not at all."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), open(staged, "w", encoding="utf-8") as file:
            file.write(text)
            flush_to_disk(file)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """A failure of the system inside the block names `path`, which one from a full disk does not."""
    try:
        yield
    except Exception as error:
        if (number := _system_error(error)) is None:
            raise
        raise OSError(number, os.strerror(number), str(_final(path))) from error


@contextlib.contextmanager
def naming_in(folder: Path) -> Iterator[None]:
    """A full or read-only disk met inside the block, where files of `folder` are written, names it or a file in it."""
    try:
        yield
    except Exception as error:
        number = _system_error(error)
        if number not in _DISK:
            raise
        name = error.filename if isinstance(error, OSError) else None
        raise OSError(number, os.strerror(number), str(_final(Path(os.fsdecode(name)) if name else folder))) from error


def _system_error(error: Exception) -> int | None:
    """The system's number for an error, also where a library written in Rust (safetensors, tokenizers) met it."""
    if isinstance(error, OSError):
        return error.errno
    found = None if isinstance(error, LmtuneError) else re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _final(path: Path) -> Path:
    """What `path` would have been called when it was complete."""
    return Path(*(part.removeprefix(".staging-") for part in path.parts))


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder to fill, which is called `target` when the block has ended well, and else vanishes.

    So do the folders above it that were made for it.

    Raises:
        ConfigError: another process is making this folder now.
        OSError: the disk is full or must not be written; names what.
    """
    staging = target.with_name(f".staging-{target.name}")
    above = [folder for folder in staging.parents if not folder.exists()]
    with naming_in(target):
        staging.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(staging, os.O_RDONLY)
    try:
        if not locks.take(descriptor) or not _is_still(staging, descriptor):
            raise ConfigError(f"{target}: another lmtune process is writing this folder now; wait for it")
        try:
            for path in staging.iterdir():  # a crash left it
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            yield staging
            share_files(staging)
            replace_folder(staging, target)
        finally:
            if _is_still(staging, descriptor):
                shutil.rmtree(staging, ignore_errors=True)
                with contextlib.suppress(OSError):  # somebody else has put something there
                    for folder in above:
                        folder.rmdir()
    finally:
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether `path` names the open folder; the process that held it before may have given it its name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def replace_folder(staging: Path, target: Path) -> None:
    """Give the complete folder `staging` the name `target`; an earlier one goes whole, not file by file.

    Killed in between, there is the earlier folder, the new one or none, but never half of one.

    Raises:
        OSError: the disk is full or must not be written; names what.
    """
    earlier = target.with_name(f".earlier-{target.name}")
    with naming_in(target):
        for path in staging.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    flush_to_disk(file)
        sync_folder(staging)
        shutil.rmtree(earlier, ignore_errors=True)  # a crash left it
        if target.exists():
            target.rename(earlier)
        staging.rename(target)
        sync_folder(target.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Replace `path` by `tree` as indented JSON; NaN and infinity, which JSON has not, are an error."""
    write_text(path, json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


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


def share_files(folder: Path) -> None:
    """Give the files of a folder the mode that new files have; safetensors makes its own readable by the owner only."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~umask)


def keep_lines(path: Path, keep: int) -> None:
    """Cut `path` after its first `keep` lines, and after a last line that a crash left half written."""
    if not path.is_file():
        return
    lines = path.read_bytes().split(b"\n")
    whole = lines[:-1][:keep]  # what follows the last newline is either empty or half a line
    write_text(path, b"".join(line + b"\n" for line in whole).decode("utf-8"))
