"""The run directory: where a run's files are, who may write there, and how a file is written so that it is whole.

    runs/NAME/  config.yaml  environment.json  data.json  metrics.jsonl  results.csv  summary.json
                answers.jsonl  verification.json  checkpoints/  adapter/  merged/

Every file appears under its name only when it is complete: it is written beside it, flushed to the disk, and renamed.
Nothing here imports torch, so that listing runs answers at once.
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

from lmtune.config import RunConfig
from lmtune.errors import CheckpointError, ConfigError, LmtuneError

# A disk that is full, broken, or must not be written
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}

_MAX_NAME_BYTES = 255  # of a file or folder, on every common file system


class RunDirectory:
    """The paths of one run. Creating the object touches nothing on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.data = self.path / "data.json"
        self.metrics = self.path / "metrics.jsonl"
        self.results = self.path / "results.csv"
        self.summary = self.path / "summary.json"
        self.answers = self.path / "answers.jsonl"
        self.verification = self.path / "verification.json"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.merged = self.path / "merged"

    @classmethod
    def of(cls, run: RunConfig) -> RunDirectory:
        """The directory `run.dir/run.name`.

        Raises:
            ConfigError: the run has no name; or its folder is a link, holds one, lies outside `run.dir`, or holds a
                folder where a run writes a file.
        """
        if run.name is None:
            raise ConfigError("run.name: missing; name the run, for example run.name=support")
        parent = home_expanded(run.dir, "run.dir")
        path = parent / run.name
        require_possible(path, "run.dir")
        if path.is_symlink() or not path.resolve().is_relative_to(parent.resolve()):
            raise ConfigError(f"run.name: {path} leads out of {parent}; a run is a plain folder in run.dir")
        if path.exists() and not path.is_dir():
            raise ConfigError(f"run.name: {path} is a file; choose another run.name")
        if path.is_dir() and (links := sorted(inner for inner in path.iterdir() if inner.is_symlink())):
            raise ConfigError(f"run.name: {links[0]} is a link, which a run writes to no other place; remove it")
        made = cls(path)
        files = (made.config, made.environment, made.data, made.metrics, made.results, made.summary, made.answers)
        for file in (*files, made.verification):
            if file.is_dir():
                raise ConfigError(f"run.name: {file} is a folder, where a run writes a file; remove it")
        for folder in (made.checkpoints, made.adapter):
            if folder.is_file():
                raise ConfigError(f"run.name: {folder} is a file, where a run writes a folder; remove it")
        return made

    @property
    def name(self) -> str:
        """The run's folder name."""
        return self.path.name

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return os.path.isfile(self.config)  # unlike pathlib's, also false for names that are too long

    def read_json(self, path: Path) -> dict[str, Any]:
        """One of the run's JSON files, or `{}` if it is not there yet.

        Raises:
            CheckpointError: the file is damaged.
        """
        if not path.is_file():
            return {}
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not valid JSON ({error}); delete it or restore it") from None
        return tree if isinstance(tree, dict) else {}

    def read_summary(self) -> dict[str, Any]:
        """`summary.json`, or `{}` if it is not there yet; its scores are numbers or null, whatever else it says.

        Raises:
            CheckpointError: the file is damaged.
        """
        summary = self.read_json(self.summary)
        for key in ("base", "tuned"):
            scores = summary.get(key)
            if scores is not None and not (isinstance(scores, dict) and all(map(_is_score, scores.values()))):
                raise CheckpointError(f"{self.summary}: damaged: {key} holds no scores; delete it or restore it")
        if not isinstance(summary.get("steps", 0), int):
            raise CheckpointError(f"{self.summary}: damaged: steps is no number; delete it or restore it")
        return summary

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; a second process is refused, and a crash lets go by itself.

        Raises:
            CheckpointError: another process is writing to this run.
            ConfigError: the folder cannot be written.
        """
        import fcntl

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            opened = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(
                f"run.dir: {self.path} cannot be written ({error.strerror}); permit it or choose another run.dir"
            ) from None
        with opened as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                raise CheckpointError(
                    f"{self.path} is in use by another lmtune process (pid {file.read().strip() or 'unknown'}); "
                    "wait for it, or give this run another run.name"
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def clean(self) -> None:
        """Remove what a crash in the middle of writing has left; for who holds the lock."""
        for path in self.path.glob(".*.tmp"):
            path.unlink(missing_ok=True)
        for folder in (self.path / ".staging-adapter", *self.checkpoints.glob(".staging-*")):
            shutil.rmtree(folder, ignore_errors=True)

    def set_aside(self) -> Path:
        """Rename this run to the first free `NAME-old-N`, so that a new one can begin; returns the new path."""
        number = 1
        while (target := self.path.with_name(f"{self.name}-old-{number}")).exists():
            number += 1
        self.path.rename(target)
        return target


def home_expanded(path: str | Path, setting: str) -> Path:
    """`path` with a `~` at its beginning as the home folder that a shell would make of it.

    Raises:
        ConfigError: there is no such person; names `setting`.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{setting}: {path}: {str(error).rstrip('.')}; write the folder out") from None


def require_possible(path: Path, setting: str) -> None:
    """Raise ConfigError, naming `setting`, if no folder can be at `path`: too long a name, or a file in the way."""
    try:
        too_long = any(len(os.fsencode(part)) > _MAX_NAME_BYTES for part in path.parts)
        if not too_long:
            os.lstat(path)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting}: {path}: {getattr(error, 'strerror', None) or error}; choose another") from None
    if too_long:
        raise ConfigError(f"{setting}: {path}: a name of over {_MAX_NAME_BYTES} bytes; choose a shorter one")


def _is_score(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def find_run(target: str | Path, runs_dir: str | Path = "runs") -> RunDirectory | None:
    """The run that `target` names, as a path or as a name in `runs_dir`; None if it is no run."""
    for path in (Path(target), Path(runs_dir) / str(target)):
        run = RunDirectory(path)
        if run.exists():
            return run
    return None


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
