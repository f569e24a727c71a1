"""Whether this process works or hangs, as far as the system can tell: what works computes, reads or writes.

Asked from a thread of the process itself, whose own share is left out. Processes that it started count with it, as a
pool that tokenises does.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

_CPU_SHARE = 0.02  # of one processor; a process that waits for a lock, a pipe or a network takes less
_BYTES = 4 << 20  # read and written between two looks; what finding the processes takes is less


class Activity:
    """How long this process has done nothing. To be used by one thread, which does nothing else."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._active = time.monotonic()
        # The cheapest first: each file that is opened waits for the interpreter's lock, which a process that computes
        # in Python gives up after 5 ms only.
        self._signs = [_Sign(self._own_seconds), _Sign(self._moved_bytes, _BYTES), _Sign(self._childrens_seconds)]

    def idle_seconds(self) -> float:
        """Seconds since this process, or one that it started, was last seen to work."""
        if any(sign.is_seen() for sign in self._signs):
            self._active = time.monotonic()
        return time.monotonic() - self._active

    def _own_seconds(self) -> float:
        return time.process_time() - time.thread_time()

    def _moved_bytes(self) -> float:
        return _moved(self._process) + sum(map(_moved, self._children()))

    def _childrens_seconds(self) -> float:
        return sum(map(_seconds, self._children()))

    def _children(self) -> list[psutil.Process]:
        try:
            return list(self._process.children(recursive=True))
        except psutil.Error:
            return []


class _Sign:
    """Something that grows while a process works."""

    def __init__(self, measure: Callable[[], float], enough: float | None = None) -> None:
        self._measure, self._enough = measure, enough
        self._looked, self._value = time.monotonic(), measure()

    def is_seen(self) -> bool:
        """Whether it has grown enough since the last look: by `enough`, or by a share of the time."""
        now, value = time.monotonic(), self._measure()
        enough = _CPU_SHARE * max(now - self._looked, 0.1) if self._enough is None else self._enough
        grown = value - self._value >= enough
        self._looked, self._value = now, value
        return grown


def _moved(process: psutil.Process) -> float:
    """Bytes that a process has read and written; 0 where the system does not say, as macOS, or it has ended."""
    try:
        io = process.io_counters() if hasattr(process, "io_counters") else None
    except psutil.Error:
        return 0.0
    names = ("read_bytes", "write_bytes", "read_chars", "write_chars")
    return float(sum(getattr(io, name, 0) for name in names)) if io else 0.0


def _seconds(process: psutil.Process) -> float:
    """Processor time of a process; 0 where it has ended."""
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)
