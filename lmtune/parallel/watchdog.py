"""A time limit on waiting for another rank: a job of which one process hangs ends, and says which one.

A backend's own limit names nobody. So a thread of each process posts its phase, the number of collectives it has
entered and for how long it has done nothing, in the store through which the processes found each other. Who has waited
longer than the limit reads there which rank is missing. One that works counts as alive, however long it takes: rank 0
may tokenize, quantize or save while the others wait. One that does nothing, or posts no more, is named, and all end.
Inside a training step the limit holds for work too: a GPU that hangs keeps its process busy.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import psutil
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lmtune.io.console import err, escape
from lmtune.parallel.links import LINK_SECONDS, Links
from lmtune.parallel.worker import note_exit_code, spans_machines

_KEY = "lmtune/"
_STORE_SECONDS = 10.0  # for an answer of the store
_NOTE_SECONDS = 20.0  # to write down why; a disk behind a network that is cut may never answer
_LOSS_SECONDS = 1.0  # for the end of another process to be known here
_ALONE = 10  # limits without a sign of work, for a process that the others know to work alone


class Watched(Protocol):
    """What the watchdog asks of the process that it watches."""

    rank: int
    world_size: int
    phase: str
    works_alone: bool
    on_failure: Callable[[str], None] | None


class Watchdog:
    """One process's thread: posts its phase, and ends it when a collective lasts longer than the limit."""

    def __init__(self, process: Watched, limit_seconds: float) -> None:
        self._process, self._limit = process, limit_seconds
        self._entered, self._since = 0, None  # type: int, float | None
        self._moved = time.monotonic()
        self._store = TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
            timeout=timedelta(seconds=_STORE_SECONDS),
        )  # fmt: skip
        self._activity, self._asked, self._idle = Activity(), 0.0, 0.0
        self._beats = 0
        self._state, self._state_since = "", time.monotonic()  # the phase of this process, and since when
        self._heard: dict[int, tuple[str, float]] = {}  # what each process posted last, and since when
        self._stopped, self._lock, self._ending = threading.Event(), threading.Lock(), threading.Lock()
        self._links: Links | None = None  # on one machine the kernel closes all connections of a process that is gone
        if spans_machines():
            limit = min(LINK_SECONDS, limit_seconds / 2)  # before the watchdog, which does not know of machines
            self._links = Links(process.rank, self._store, limit, lambda: self._since is not None, self._end)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def enter(self) -> None:
        """This process waits for the others from now on."""
        self._entered += 1
        self._since = self._moved = time.monotonic()

    def leave(self) -> None:
        """The collective is complete."""
        self._since, self._moved = None, time.monotonic()

    def close(self) -> None:
        """Stop watching; the thread must not outlive the store."""
        self._stopped.set()
        self._thread.join(_STORE_SECONDS)
        if self._lock.acquire(timeout=_STORE_SECONDS):  # not if the thread waits for a store that is out of reach
            with contextlib.suppress(RuntimeError):
                self._post("ended")  # for those who wait in vain
            self._lock.release()
        if self._links is not None:
            self._links.close()

    def why_apart(self) -> str:
        """Why the group fell apart, as far as this process knows; ends it if another one gave up and said why."""
        lost = None if self._links is None else self._links.wait_for_loss(_LOSS_SECONDS)
        if lost is not None and lost.reason:
            self._end(lost.reason)
        with contextlib.suppress(RuntimeError), self._lock:  # RuntimeError: the store is gone too
            if self._store.check([f"{_KEY}given up"]):
                self._end(self._store.get(f"{_KEY}reason").decode())
        who = "a peer exited" if lost is None else f"{lost.who} exited"
        says = "the other process, or the launcher, says why" if lost is None else "what it printed there says why"
        return f"{who} during {self._process.phase}; {says}"

    def _run(self) -> None:
        alone: float | None = None  # since when the store is gone, with the process that held it
        while not self._stopped.wait(min(1.0, self._limit / 10)):
            try:
                with self._lock:
                    self._look()
                alone = None
            except RuntimeError:
                now = time.monotonic()
                alone = now if alone is None else alone
                if now - max(alone, self._moved) > self._limit:
                    self._end(f"rank {self._process.rank} hangs (phase: {self._process.phase}), and rank 0 has ended")

    def _look(self) -> None:
        """Post this process's phase; end it if it, or another one, has waited too long."""
        entered, since = self._entered, self._since
        if time.monotonic() - self._asked >= self._limit / 20:
            self._idle, self._asked = self._activity.idle_seconds(), time.monotonic()
        self._post(self._process.phase)
        if self._store.check([f"{_KEY}given up"]):
            self._end(self._store.get(f"{_KEY}reason").decode())
        waited = 0.0 if since is None else time.monotonic() - since
        missing = self._missing_ranks(entered) if waited > self._limit / 2 else None
        if waited > self._limit and missing is not None:
            reason = (
                f"collective timed out after {self._limit:g} s (run.process_timeout_seconds); missing ranks: "
                f"{', '.join(missing) or 'none'}\n  look at what hangs there (py-spy dump, nvidia-smi), or raise the "
                "limit if it is only slow; the same command resumes from the last checkpoint"
            )
            self._store.set(f"{_KEY}reason", reason)
            self._end(reason, first=self._store.add(f"{_KEY}given up", 1) == 1)

    def _post(self, state: str) -> None:
        self._beats += 1
        if state != self._state:
            self._state, self._state_since = state, time.monotonic()
        in_step = time.monotonic() - max(self._state_since, self._moved) if state.startswith("step ") else 0.0
        post = {  # `beat` changes with every post, so that one that has stopped can be told
            "beat": self._beats, "entered": self._entered, "state": state, "idle": self._idle,
            "alone": self._process.works_alone, "in_step": in_step,
        }  # fmt: skip
        self._store.set(f"{_KEY}{self._process.rank}", json.dumps(post))

    def _missing_ranks(self, entered: int) -> list[str] | None:
        """The ranks that hang, with their phase, among those with fewer collectives than this one has `entered`.

        None while those that are missing work.
        """
        missing, found = 0, []
        for rank in range(self._process.world_size):
            known = self._store.check([f"{_KEY}{rank}"])
            text = self._store.get(f"{_KEY}{rank}").decode() if known else '{"entered": 0, "state": "not started"}'
            post = json.loads(text)
            if post["entered"] >= entered:
                continue
            missing += 1
            if self._hangs(rank, text, post):
                found.append(f"{rank} (phase: {post['state']})")
        return found if found or not missing else None

    def _hangs(self, rank: int, text: str, post: dict[str, Any]) -> bool:
        """Whether the process that posted this has shown no sign of life or work for as long as the limit allows."""
        now = time.monotonic()
        if self._heard.get(rank, ("", 0.0))[0] != text:
            self._heard[rank] = text, now
        if now - self._heard[rank][1] > self._limit or post.get("in_step", 0.0) > self._limit:
            return True
        return bool(post.get("idle", 0.0) > self._limit * (_ALONE if post.get("alone") else 1))

    def _end(self, reason: str, first: bool = False) -> None:
        """End this process, whose main thread cannot be reached; the first one to give up, or one of each machine, says
        why."""
        self._ending.acquire()  # by the thread that comes first
        if first or (self._links is not None and os.environ.get("LOCAL_RANK", "0") == "0"):
            err.print(f"[bold red]error:[/] {escape(reason)}")
        if self._links is not None:
            self._links.tell(reason)
        if self._process.on_failure is not None:
            noting = threading.Thread(target=self._process.on_failure, args=(reason,), daemon=True)
            noting.start()
            noting.join(_NOTE_SECONDS)
        note_exit_code(1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


_CPU_SHARE = 0.02  # of one processor; a process that waits for a lock, a pipe or a network takes less
_BYTES = 4 << 20  # read and written between two looks; what finding the processes takes is less


class Activity:
    """How long this process has done nothing. To be used by one thread, which does nothing else."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._active = time.monotonic()
        self._last: dict[str, tuple[float, float]] = {}  # when each was looked at, and what it was
        for name in ("own", "bytes", "children"):
            self._has_grown(name)

    def idle_seconds(self) -> float:
        """Seconds since this process, or one that it started, was last seen to compute, read or write."""
        # The cheapest first: each file of /proc that is opened waits for the interpreter's lock, which a process that
        # computes in Python gives up after 5 ms only.
        if any(self._has_grown(name) for name in ("own", "bytes", "children")):
            self._active = time.monotonic()
        return time.monotonic() - self._active

    def _has_grown(self, name: str) -> bool:
        """Whether it has grown since the last look: bytes by `_BYTES`, processor time by a share of the time."""
        now = time.monotonic()
        if name == "own":
            value = time.process_time() - time.thread_time()
        elif name == "bytes":
            value = sum(map(_moved_bytes, [self._process, *self._children()]))
        else:
            value = sum(map(_processor_seconds, self._children()))
        looked, before = self._last.get(name, (now, value))
        self._last[name] = now, value
        return value - before >= (_BYTES if name == "bytes" else _CPU_SHARE * max(now - looked, 0.1))

    def _children(self) -> list[psutil.Process]:
        try:
            return list(self._process.children(recursive=True))
        except psutil.Error:
            return []


def _moved_bytes(process: psutil.Process) -> float:
    """Bytes that a process has read and written; 0 where the system does not say, as macOS, or it has ended."""
    try:
        io = process.io_counters()
    except (AttributeError, psutil.Error):
        return 0.0
    return float(sum(getattr(io, name, 0) for name in ("read_bytes", "write_bytes", "read_chars", "write_chars")))


def _processor_seconds(process: psutil.Process) -> float:
    """Processor time of a process; 0 where it has ended."""
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)
