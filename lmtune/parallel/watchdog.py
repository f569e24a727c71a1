"""A time limit on waiting for another rank: a job of which one process hangs ends, and says which one.

A process that hangs leaves the others in a collective that never returns, and what the backend says after its own limit
names nobody. So each process counts the collectives it has entered and notes its phase; a thread of each posts this in
the store through which the processes found each other, with for how long the process has done nothing. A process that
has waited longer than the limit reads there which rank is missing. One that works counts as alive, however long it
takes: rank 0 may have rows to tokenize, weights to quantize or files to save while the others wait. One that does
nothing, or posts no more, is named, and all end; so does the one that hangs, whose thread is alive. Inside a training
step, which takes all ranks about as long, the limit holds for work too: a GPU that hangs keeps its process busy.
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
from typing import Protocol, TypedDict

import psutil
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lmtune.io.console import err, escape
from lmtune.parallel.worker import note_exit_code

_KEY = "lmtune/"
_STORE_SECONDS = 10.0  # for an answer of the store
_ALONE = 10  # limits without a sign of work, for a process that the others know to work alone


class Watched(Protocol):
    """What the watchdog asks of the process that it watches."""

    rank: int
    world_size: int
    phase: str
    works_alone: bool
    on_failure: Callable[[str], None] | None


class _Post(TypedDict, total=False):
    """What each process posts: `beat` changes with every post, so that one that has stopped can be told."""

    beat: int
    entered: int
    state: str
    idle: float
    alone: bool
    in_step: float


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
        self._stopped, self._lock = threading.Event(), threading.Lock()
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
        with contextlib.suppress(RuntimeError), self._lock:
            self._post("ended")  # for those who wait in vain

    def end_if_given_up(self) -> None:
        """End this process if another one has given up waiting and said why: that is why the group fell apart."""
        with contextlib.suppress(RuntimeError), self._lock:  # RuntimeError: the store is gone too
            if self._store.check([f"{_KEY}given up"]):
                self._end(self._store.get(f"{_KEY}reason").decode())

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
            reason = _reason(missing, self._limit)
            self._store.set(f"{_KEY}reason", reason)
            self._end(reason, first=self._store.add(f"{_KEY}given up", 1) == 1)

    def _post(self, state: str) -> None:
        self._beats += 1
        if state != self._state:
            self._state, self._state_since = state, time.monotonic()
        in_step = time.monotonic() - max(self._state_since, self._moved) if state.startswith("step ") else 0.0
        post: _Post = {
            "beat": self._beats, "entered": self._entered, "state": state, "idle": self._idle,
            "alone": self._process.works_alone, "in_step": in_step,
        }  # fmt: skip
        self._store.set(f"{_KEY}{self._process.rank}", json.dumps(post))

    def _missing_ranks(self, entered: int) -> list[str] | None:
        """The ranks that hang and are missing here, with their phase; None while those that are missing work.

        Args:
            entered: how many collectives this process has entered; a rank that has entered fewer is missing.
        """
        missing, found = 0, []
        for rank in range(self._process.world_size):
            known = self._store.check([f"{_KEY}{rank}"])
            text = self._store.get(f"{_KEY}{rank}").decode() if known else '{"entered": 0, "state": "not started"}'
            post: _Post = json.loads(text)
            if post["entered"] >= entered:
                continue
            missing += 1
            if self._hangs(rank, text, post):
                found.append(f"{rank} (phase: {post['state']})")
        return found if found or not missing else None

    def _hangs(self, rank: int, text: str, post: _Post) -> bool:
        """Whether the process that posted this has shown no sign of life or work for as long as the limit allows."""
        now = time.monotonic()
        if self._heard.get(rank, ("", 0.0))[0] != text:
            self._heard[rank] = text, now
        if now - self._heard[rank][1] > self._limit or post.get("in_step", 0.0) > self._limit:
            return True
        return bool(post.get("idle", 0.0) > self._limit * (_ALONE if post.get("alone") else 1))

    def _end(self, reason: str, first: bool = False) -> None:
        """End this process, whose main thread cannot be reached; the first one to give up says why."""
        if first:
            err.print(f"[bold red]error:[/] {escape(reason)}")
        if self._process.on_failure is not None:
            self._process.on_failure(reason)
        note_exit_code(1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _reason(missing: list[str], limit: float) -> str:
    return (
        f"collective timed out after {limit:g} s (run.process_timeout_seconds); missing ranks: "
        f"{', '.join(missing) or 'none'}\n"
        "  look at what hangs there (py-spy dump, nvidia-smi), or raise the limit if it is only slow; the same command "
        "resumes from the last checkpoint"
    )


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
