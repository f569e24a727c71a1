"""The process that trains a job: started, found again by a later server, asked to stop.

    process = JobProcess(folder, "ftjob-…", run)
    process.start(config, {})
    process.is_alive(); process.stop(); process.exit_code

It is in a session of its own, so that it outlives the server. It holds the lock of a file from its first moment to its
last: the kernel lets the lock go whatever ends it. So a server that starts again knows which jobs still train; a number
of a process alone would not tell, since numbers are used again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from lmtune.errors import LmtuneError
from lmtune.io.atomic import try_lock
from lmtune.runs.control import cancel
from lmtune.runs.store import RunDirectory

_LAST_WORDS = 2000  # characters
_KEY = "LMTUNE_API_KEY"  # of the server's clients; training needs none


class JobProcess:
    """The process of one job, wherever it was started."""

    def __init__(self, folder: Path, job: str, run: RunDirectory) -> None:
        self.run = run
        self.log = folder / f"{job}.log"
        self._lock = folder / f"{job}.lock"
        self._child: subprocess.Popen[bytes] | None = None
        self._is_asked = False

    def start(self, config: Path, environment: Mapping[str, str], device: str | None = None) -> None:
        """Run `lmtune finetune CONFIG`; nobody else may do it at the time.

        Args:
            config: the YAML file.
            environment: variables beside those of the server.
            device: the value of CUDA_VISIBLE_DEVICES; None leaves it as it is.
        """
        shown = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
        inherited = {name: value for name, value in os.environ.items() if name != _KEY}
        with self._lock.open("a+") as lock, self.log.open("wb") as log:
            held = try_lock(lock)
            assert held is not False, f"{self._lock} is held"
            lock.truncate(0)
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "lmtune", "finetune", str(config)], stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True, pass_fds=[lock.fileno()],
                env={**inherited, **environment, **shown},
            )  # fmt: skip
            lock.write(f"{self._child.pid}\n{device or ''}")

    def is_alive(self) -> bool:
        """Whether it works, as a child of this process or of an earlier server."""
        if self._child is not None and self._child.poll() is None:
            return True
        try:
            with self._lock.open() as lock:
                return try_lock(lock, shared=True) is False
        except FileNotFoundError:
            return False

    def stop(self) -> None:
        """Ask it, once, to end its step, save and go."""
        if self._is_asked or not self.is_alive():
            return
        number = self._lock.read_text().partition("\n")[0]
        with contextlib.suppress(ProcessLookupError, LmtuneError):
            if number:
                os.kill(int(number), signal.SIGTERM)
            else:  # the server that started it was killed before it could write the number down
                cancel(self.run)
            self._is_asked = True

    @property
    def exit_code(self) -> int | None:
        """As `subprocess` has it; None where an earlier server started the process, or it works."""
        return None if self._child is None else self._child.poll()

    @property
    def device(self) -> str | None:
        """What it was started with; None for all devices."""
        try:
            return self._lock.read_text().partition("\n")[2] or None
        except FileNotFoundError:
            return None

    @property
    def started_at(self) -> float:
        """When it was started, in seconds of the epoch; 0 for a job that was never started."""
        try:
            return self._lock.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def last_words(self) -> str:
        """What it said of the error that it ended with, or its last line."""
        try:
            said = self.log.read_bytes()[-100_000:].decode("utf-8", "replace").strip()
        except FileNotFoundError:
            return ""
        _, mark, error = said.rpartition("\nerror: " if "\nerror: " in said else "error: ")
        return (error if mark else said.rpartition("\n")[2])[-_LAST_WORDS:]
