"""What a process of a job knows of the command that started it: how many were asked for, and whether it still runs.

`accelerate launch --cpu --num_processes 2` starts a single process without an error. So what was asked for is compared
with what runs before anything is loaded.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import IO

from lmtune.errors import ConfigError
from lmtune.io.atomic import try_lock
from lmtune.models.libraries import ignore_accelerate_settings

NUM_PROCESSES = "LMTUNE_NUM_PROCESSES"  # set by `lmtune finetune --processes N` for the processes that it starts
EXIT_CODES = "LMTUNE_EXIT_CODES"  # a file where each of these processes notes the exit code it ended with
PARENT_PID = "LMTUNE_PARENT_PID"  # the process id of the command, for its launcher; of the launcher, for the processes
_LOOK_SECONDS = 1.0
# Set by `torchrun`, MPI and SLURM. Without WORLD_SIZE no launcher is at work, but Accelerate would wait for processes.
_LAUNCHER = ("LOCAL_RANK", "RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_held: list[IO[str]] = []  # open while this process lives


def check_world() -> None:
    """Leave Accelerate no settings but ours; ConfigError if fewer or more processes run than were asked for."""
    ignore_accelerate_settings()
    if not is_worker():
        for name in _LAUNCHER:
            os.environ.pop(name, None)
    running = int(os.environ.get("WORLD_SIZE", "1"))
    asked = int(os.environ.get(NUM_PROCESSES, running))
    if "WORLD_SIZE" not in os.environ and "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ:
        raise ConfigError(
            "accelerate launch was asked for several processes but started one: its --cpu option does that. Use "
            "`lmtune finetune CONFIG --processes N`, or "
            "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N recipes/finetune.py CONFIG`"
        )
    if asked != running:
        raise ConfigError(f"--processes: {asked} processes were asked for, {running} are running")


def is_worker() -> bool:
    """Whether a launcher started this process as one of several."""
    return "WORLD_SIZE" in os.environ


def spans_machines() -> bool:
    """Whether the processes of this job may be on several machines."""
    return os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE")


def note_exit_code(code: int) -> None:
    """Tell the command that started this process how it ended; the launcher in between only says that it failed."""
    if path := os.environ.get(EXIT_CODES):
        with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:  # the command may be gone
            file.write(f"{code}\n")


def exit_with_parent() -> None:
    """From now on stop as for SIGTERM when the process that started this one is gone; nobody else would say so."""
    parent = os.getppid()
    starter = int(os.environ.get(PARENT_PID, parent))  # it may have gone before this process looked
    threading.Thread(target=_follow, args=(parent, starter), name="starter", daemon=True).start()


def _follow(parent: int, starter: int) -> None:
    with contextlib.suppress(OSError):
        while os.getppid() == parent:
            os.kill(starter, 0)  # an OSError if it is gone
            time.sleep(_LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def hold_exit_codes() -> None:
    """Keep the file of exit codes locked, with the other processes, for as long as this one lives."""
    if path := os.environ.get(EXIT_CODES):
        with contextlib.suppress(OSError):
            _held.append(open(path, "a", encoding="utf-8"))  # noqa: SIM115
            try_lock(_held[-1], shared=True)
