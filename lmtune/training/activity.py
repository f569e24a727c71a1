"""Whether this process works or hangs, as far as the system can tell: what works computes, reads or writes.

Asked from a thread of the process itself, whose own share is left out. Processes that it started count with it, as a
pool that tokenises does.
"""

from __future__ import annotations

import time

import psutil

_CPU_SHARE = 0.02  # of one processor; a process that waits for a lock, a pipe or a network takes less
_BYTES = 4 << 20  # read and written between two looks; what finding the processes themselves takes is less


class Activity:
    """How long this process has done nothing. To be used by one thread, which does nothing else."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._looked = self._active = time.monotonic()
        self._cpu, self._bytes = self._measured()

    def idle_seconds(self) -> float:
        """Seconds since this process, or one that it started, was last seen to work."""
        now = time.monotonic()
        cpu, moved = self._measured()
        if cpu - self._cpu >= _CPU_SHARE * max(now - self._looked, 0.1) or moved - self._bytes >= _BYTES:
            self._active = now
        self._looked, self._cpu, self._bytes = now, cpu, moved
        return now - self._active

    def _measured(self) -> tuple[float, int]:
        """Seconds of processor time, and bytes read and written."""
        cpu, moved = time.process_time() - time.thread_time(), 0
        for process in (self._process, *self._children()):
            try:
                if process is not self._process:
                    times = process.cpu_times()
                    cpu += times.user + times.system
                if hasattr(process, "io_counters"):  # not on macOS
                    io = process.io_counters()
                    moved += io.read_bytes + io.write_bytes
                    moved += getattr(io, "read_chars", 0) + getattr(io, "write_chars", 0)
            except psutil.Error:  # it has ended
                continue
        return cpu, moved

    def _children(self) -> list[psutil.Process]:
        try:
            return list(self._process.children(recursive=True))
        except psutil.Error:
            return []
