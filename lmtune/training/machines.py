"""What the processes of a run must have in common, which may be on machines with disks of their own.

A resumed run, and the best step at its end, are read by every process from the run's folder. Rows, base and settings
decide each process's part of a step. A machine with another copy of them would not fail: its result would be wrong.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from pathlib import Path

from lmtune.errors import ConfigError
from lmtune.io.text import format_list
from lmtune.parallel.base import Parallel
from lmtune.parallel.worker import spans_machines
from lmtune.runs.store import RunDirectory
from lmtune.training.compose import Components

SEEN_SECONDS = 65.0  # until a network file system shows a new folder: NFS looks again after 60


def require_common_ground(run: RunDirectory, parts: Components) -> None:
    """Raise ConfigError on all processes if one has other rows, weights or settings, or not the folder of the run."""
    hosts = parts.parallel.gather([(socket.gethostname(), parts.signature)])
    host, first = hosts[0]
    for rank, (other_host, other) in enumerate(hosts):
        if differences := first.differences(other):
            raise ConfigError(
                f"{run.path}: rank {rank} on {other_host} has others than rank 0 on {host}\n"
                f"{format_list(differences)}\n  start the same command on all machines, with the same files"
            )
    if spans_machines():
        _require_shared(run.path.parent, parts.parallel, [host for host, _ in hosts])


def _require_shared(folder: Path, parallel: Parallel, hosts: list[str]) -> None:
    """Raise ConfigError on all processes if one does not see a file that rank 0 writes into the folder."""
    probe = folder / f".shared-{parallel.gather([secrets.token_hex(8)])[0]}"
    is_new = not folder.exists()
    if parallel.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
    parallel.barrier()
    seen = parallel.gather([_appears(probe)])
    if parallel.is_main:
        probe.unlink()
    if False in seen:
        if parallel.is_main and is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        rank = seen.index(False)
        raise ConfigError(
            f"run.dir: {folder}: rank {rank} on {hosts[rank]} has another folder of this name than rank 0 on "
            f"{hosts[0]}; expected one folder on a disk that all machines share; set run.dir to such a one"
        )


def _appears(path: Path) -> bool:
    """Whether the file is there, at the latest when a network file system has looked again."""
    until = time.monotonic() + SEEN_SECONDS
    while not os.path.exists(path):
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True
