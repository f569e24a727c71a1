"""Stop a run that another process holds, and delete runs.

cancel(run)         # SIGTERM to the process in the run's lock; it ends its step, saves a checkpoint and goes
delete(run.path)    # the folder with all that is in it; refused while a process writes to it
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from lmtune.errors import CheckpointError, LmtuneError, ModelError
from lmtune.io.text import pluralize
from lmtune.runs.history import overview
from lmtune.runs.store import RunDirectory, find_run, run_folders, run_hint

_LOOK_SECONDS = 0.1


def holder_of(run: RunDirectory) -> int:
    """The process on this machine that writes to the run.

    Raises:
        ModelError: nobody does.
        LmtuneError: it is not on this machine, or not ours to stop.
    """
    import psutil

    if not run.is_running():
        raise ModelError(f"{run.path}: no process writes to this run; it is {overview(run).status}")
    lock = run.path / ".lock"
    number = lock.read_text(encoding="utf-8").strip()
    try:
        # A number alone may by now be that of another program, or come from another machine on the same disk.
        files = [file.path for file in psutil.Process(int(number)).open_files()]
    except psutil.AccessDenied:
        raise LmtuneError(f"{run.path}: held by process {number} of another user; ask that user to stop it") from None
    except (psutil.Error, ValueError):
        files = []
    if os.path.realpath(lock) not in files:
        raise LmtuneError(
            f"{run.path}: held by process {number or '?'}, which is not on this machine; cancel it where it runs"
        )
    return int(number)


def cancel(run: RunDirectory) -> int:
    """Ask the process that holds the run to end its step, save and stop; returns its id. Errors as `holder_of`."""
    process = holder_of(run)
    try:
        os.kill(process, signal.SIGTERM)
    except PermissionError:
        raise LmtuneError(f"{run.path}: held by process {process} of another user; ask that user to stop it") from None
    return process


def wait_until_free(run: RunDirectory, seconds: float) -> bool:
    """Whether the run is let go within so many seconds."""
    end = time.monotonic() + seconds
    while run.is_running():
        if time.monotonic() >= end:
            return False
        time.sleep(_LOOK_SECONDS)
    return True


@dataclass(frozen=True)
class Deletable:
    """A folder that may be deleted: of one run, or of the runs of a search.

    Attributes:
        runs: in it.
        files, size_bytes: of everything in it.
    """

    path: Path
    runs: tuple[RunDirectory, ...]
    files: int
    size_bytes: int

    def describe(self) -> str:
        """`runs/support (complete): 12 files, 40.1 MB`."""
        what = overview(self.runs[0]).status if len(self.runs) == 1 else pluralize(len(self.runs), "run")
        return f"{self.path} ({what}): {pluralize(self.files, 'file')}, {self.size_bytes / 1e6:,.1f} MB"

    def require_free(self) -> None:
        """Raise CheckpointError if a process writes to one of the runs."""
        for run in self.runs:
            if run.is_running():
                raise CheckpointError(
                    f"{run.path} is in use by another lmtune process; stop it first: `lmtune runs cancel {run.path}`"
                )


def deletable(target: str, runs_dir: Path) -> Deletable:
    """The folder that `target` names, as a path or as a name in `runs_dir`.

    Raises:
        ModelError: `target` names no run, and no search in `runs_dir`.
    """
    run = find_run(target, runs_dir)
    if run is not None:
        path, runs = run.path, [run, *map(RunDirectory, run_folders(run.path))]
    else:
        path = next((one for one in (Path(target), runs_dir / target) if run_folders(one)), Path(target))
        runs = [RunDirectory(one) for one in run_folders(path)]
        if not runs or path.resolve().parent != runs_dir.resolve():
            raise ModelError(f"{target}: no such run; {run_hint(target, runs_dir)}")
    # Any program may keep a config.yaml: what is deleted must be what a run has written.
    if path.is_symlink() or not all(one.config.is_file() and one.summary.is_file() for one in runs):
        raise ModelError(f"{path}: not the folder of a run, or only begun; delete it yourself")
    sizes = [file.lstat().st_size for file in path.rglob("*") if file.is_symlink() or file.is_file()]
    return Deletable(path, tuple(runs), len(sizes), sum(sizes))


def delete(what: Deletable) -> None:
    """Delete the folder; a crash in the middle leaves `.removed-NAME`, and no half of a run.

    Raises:
        CheckpointError: a process writes to a run in it.
    """
    what.require_free()
    with contextlib.ExitStack() as held:
        for run in what.runs:
            held.enter_context(run.locked())  # so that none begins meanwhile
        aside = what.path.with_name(f".removed-{what.path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        what.path.rename(aside)
        shutil.rmtree(aside)
