"""A run in the background: in a session of its own, so that it survives the terminal that started it.

    code = start_detached("finetune", ["support.yaml"], RunDirectory("runs/support"))

What the process prints goes to `output.log` of the run, and to stderr until the run has begun: its data, its warnings
and its error are seen where it was started.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lmtune.io.console import command, err, escape
from lmtune.runs.events import EventReader, StatusChanged
from lmtune.runs.store import RunDirectory

_LOOK_SECONDS = 0.1


def start_detached(verb: str, arguments: Sequence[str], run: RunDirectory, anew: bool = False) -> int:
    """Start `lmtune VERB ARGUMENTS` and wait until `run` has begun, or the process has ended.

    Args:
        run: that the command makes, or resumes.
        anew: an earlier run of this name is renamed, and its log with it.

    Returns:
        The exit code: 0 if the run goes on, else that of the process.
    """
    events = EventReader(run.events)
    for _ in events.new_events():  # those of earlier processes
        pass
    made = not run.path.parent.exists()
    run.path.parent.mkdir(parents=True, exist_ok=True)
    # The run's folder is there once it has begun; what fails before that leaves nothing.
    log = run.output if run.exists() and not anew else run.path.with_name(f".{run.name}.log")
    log.unlink(missing_ok=True) if log != run.output else None
    with log.open("ab") as written, log.open("rb") as read:
        read.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lmtune", verb, *arguments], stdin=subprocess.DEVNULL, stdout=written,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        has_begun, code = False, None
        try:
            while not has_begun and code is None:
                time.sleep(_LOOK_SECONDS)
                code = process.poll()
                has_begun = any(isinstance(event, StatusChanged) for event in events.new_events())
                sys.stderr.write(read.read().decode("utf-8", "replace"))
                sys.stderr.flush()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
    if log != run.output:
        _settle(log, run.output if has_begun else None)
    if not has_begun and made:
        with contextlib.suppress(OSError):
            run.path.parent.rmdir()
    if code is None:
        err.print(f"{escape(str(run.path))} trains in the background, as process {process.pid}")
        for what, words in (("follow", ("runs", "follow", run.path)), ("stop", ("runs", "cancel", run.path))):
            err.print(f"  {what} it: {escape(command(*words))}")
        err.print(f"  what it prints: {escape(str(run.output))}")
    return code or 0


def _settle(log: Path, place: Path | None) -> None:
    """Give the log its place in the run, or remove that of a process which has begun none."""
    if place is None:
        log.unlink(missing_ok=True)
    else:
        log.replace(place)
