"""Locks of files and folders between processes; one that dies lets go of them by itself.

    with open(path, "a") as file:
        if not take(file): …          # another process has it

Some file systems have no locks (Lustre without `-o flock`, some NFS). There nobody can be asked to wait, so a lock is
as if it were free. Only an answer of the system that another process holds it counts as held.
"""

from __future__ import annotations

import time
from typing import Protocol

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_POLL_SECONDS = 0.1


class _HasDescriptor(Protocol):
    def fileno(self) -> int: ...


def take(file: int | _HasDescriptor, shared: bool = False) -> bool:
    """Lock an open file or folder for this process, until it is closed.

    Args:
        file: the open file, or its descriptor.
        shared: other processes may hold it too, as long as each of them shares it.

    Returns:
        False if another process holds it.
    """
    held = state(file, shared)
    return held is not False


def state(file: int | _HasDescriptor, shared: bool = False) -> bool | None:
    """As `take`, and None where the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def wait_for(file: int | _HasDescriptor, shared: bool = False, seconds: float = float("inf")) -> tuple[bool, bool]:
    """As `take`, but wait for who holds it.

    Returns:
        Whether it is held now, and whether another process held it before.
    """
    until, waited = time.monotonic() + seconds, False
    while not take(file, shared):
        waited = True
        if time.monotonic() >= until:
            return False, True
        time.sleep(_POLL_SECONDS)
    return True, waited
