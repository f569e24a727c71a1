"""Processes that wait for each other, with a limit to it: a job of which one process hangs ends, and says which one.

A process that hangs leaves the others in a collective that never returns, and what the backend says after its own limit
names nobody. So each process counts the meetings it has come to and notes where it is; a thread of each posts this in
the store through which the processes found each other, with for how long the process has done nothing. Who has waited
longer than the limit reads there who has not come. One that works counts as alive, however long it takes: the first
process may have rows to tokenise, weights to quantise or files to save while the others wait. One that does nothing, or
posts no more, is named, and all end; so does the one that hangs, whose thread is alive. Inside a training step, which
takes all about as long, the limit holds for work too: a GPU that hangs keeps its process busy.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lmtune.errors import LmtuneError
from lmtune.io.console import err, escape
from lmtune.models.device import default_device, is_out_of_memory
from lmtune.parallel.worker import note_exit_code

_KEY = "lmtune/"
_STORE_SECONDS = 10.0  # for an answer of the store
_FOR_EVER = timedelta(days=365)
_ALONE = 10  # limits without a sign of work, for a process that the others know to work alone


class WatchedAccelerator(Accelerator):  # type: ignore[misc]  # Accelerate has no types
    """Accelerate's Accelerator, whose meetings of all processes are watched when there are several.

    Attributes:
        place: what this process is doing, for the message about one that hangs; `step N` is held to the limit.
        is_alone: whether the others know that they wait for this process.
        on_failure: told the reason when the watch ends this process.
    """

    def __init__(self, limit_seconds: float) -> None:
        self.place, self.is_alone = "the start", False
        self.on_failure: Callable[[str], None] | None = None
        self._watch: Watch | None = None
        backend_limit = timedelta(seconds=2 * limit_seconds + 60)  # for the processes to find each other
        on_cpu = default_device().type == "cpu"  # Accelerate's own choice may be another: mps, xpu, npu
        super().__init__(
            mixed_precision="no", cpu=on_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=backend_limit)]
        )
        if self.num_processes > 1:
            # From here on the watch says when to give up, which knows whether a process works.
            torch.distributed.distributed_c10d._set_pg_timeout(_FOR_EVER)
            self._watch = Watch(self, limit_seconds)

    def wait_for_everyone(self) -> None:
        """Go on when every process is here."""
        with self._meeting():
            super().wait_for_everyone()

    def add_over_processes(self, tensor: torch.Tensor) -> None:
        """Put the sum over all processes in the place of `tensor`; allocates nothing."""
        with self._meeting():
            torch.distributed.all_reduce(tensor)
            if self.device.type == "cuda":  # there the call returns before the others have come
                torch.cuda.current_stream().synchronize()

    def take_from_main(self, tensor: torch.Tensor) -> None:
        """Put the first process's `tensor` in the place of this process's, bit for bit, whatever its type."""
        if self.num_processes > 1:
            with self._meeting():
                given = tensor.contiguous()
                torch.distributed.broadcast(given.view(torch.uint8), src=0)
                tensor.copy_(given)
                if self.device.type == "cuda":
                    torch.cuda.current_stream().synchronize()

    def gather_object(self, items: list[Any]) -> list[Any]:
        """The items of all processes, in their order."""
        with self._meeting():
            gathered: list[Any] = gather_object(items)
            return gathered

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The first process runs the block before the others do."""
        if not self.is_main_process:
            self.wait_for_everyone()
        self.is_alone = self.is_main_process
        try:
            yield
        finally:
            self.is_alone = False
        if self.is_main_process:
            self.wait_for_everyone()

    def end_training(self) -> None:
        """Leave the group."""
        if self._watch is not None:
            self._watch.close()
        super().end_training()

    @contextlib.contextmanager
    def _meeting(self) -> Iterator[None]:
        if self._watch is None:
            yield
            return
        self._watch.arrive()
        try:
            yield
        except RuntimeError as error:  # what the backends raise when a process is gone
            if is_out_of_memory(error):
                raise
            self._watch.end_if_given_up()
            raise LmtuneError(
                f"another process of this run has ended, and process {self.process_index} cannot go on alone (in "
                f"{self.place}); the other one, or the launcher, says why"
            ) from error
        self._watch.depart()


class Watch:
    """One process's thread: posts where the process is, and ends it when a meeting lasts longer than the limit."""

    def __init__(self, accelerator: WatchedAccelerator, limit_seconds: float) -> None:
        self._accelerator, self._limit = accelerator, limit_seconds
        self._meetings, self._since = 0, None  # type: int, float | None
        self._moved = time.monotonic()
        self._store = TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
            timeout=timedelta(seconds=_STORE_SECONDS),
        )  # fmt: skip
        self._activity, self._asked, self._idle = Activity(), 0.0, 0.0
        self._beats = 0
        self._state, self._entered = "", time.monotonic()  # where this process is, and since when
        self._heard: dict[int, tuple[str, float]] = {}  # what each process posted last, and since when
        self._stopped, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def arrive(self) -> None:
        """This process waits for the others from now on."""
        self._meetings += 1
        self._since = self._moved = time.monotonic()

    def depart(self) -> None:
        """All have come."""
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
                    place, rank = self._accelerator.place, self._accelerator.process_index
                    self._end(f"process {rank} (in {place}) hangs, and the process it met the others by has ended")

    def _look(self) -> None:
        """Post where this process is; end it if it, or another one, has waited too long."""
        meetings, since = self._meetings, self._since
        if time.monotonic() - self._asked >= self._limit / 20:
            self._idle, self._asked = self._activity.idle_seconds(), time.monotonic()
        self._post(f"in {self._accelerator.place}")
        if self._store.check([f"{_KEY}given up"]):
            self._end(self._store.get(f"{_KEY}reason").decode())
        waited = 0.0 if since is None else time.monotonic() - since
        absent = self._absent(meetings) if waited > self._limit / 2 else None
        if waited > self._limit and absent is not None:
            reason = _reason(absent, self._limit)
            self._store.set(f"{_KEY}reason", reason)
            self._end(reason, first=self._store.add(f"{_KEY}given up", 1) == 1)

    def _post(self, state: str) -> None:
        self._beats += 1
        if state != self._state:
            self._state, self._entered = state, time.monotonic()
        in_step = time.monotonic() - max(self._entered, self._moved) if state.startswith("in step ") else 0.0
        post = {
            "beat": self._beats, "meetings": self._meetings, "state": state, "idle": self._idle,
            "alone": self._accelerator.is_alone, "in_step": in_step,
        }  # fmt: skip
        self._store.set(f"{_KEY}{self._accelerator.process_index}", json.dumps(post))

    def _absent(self, meetings: int) -> list[str] | None:
        """The processes that hang and are missed here, and where they are; None while those that are missed work.

        Args:
            meetings: to how many this process has come; one that has come to fewer is missed.
        """
        missed, found = 0, []
        for rank in range(self._accelerator.num_processes):
            known = self._store.check([f"{_KEY}{rank}"])
            text = self._store.get(f"{_KEY}{rank}").decode() if known else '{"meetings": 0, "state": "not started"}'
            post = json.loads(text)
            if post["meetings"] >= meetings:
                continue
            missed += 1
            if self._hangs(rank, text, post):
                found.append(f"process {rank} ({post['state']})")
        return found if found or not missed else None

    def _hangs(self, rank: int, text: str, post: dict[str, Any]) -> bool:
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
        if self._accelerator.on_failure is not None:
            self._accelerator.on_failure(reason)
        note_exit_code(1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _reason(absent: list[str], limit: float) -> str:
    who = " and ".join(absent) or "nobody is missing, but the processes"
    return (
        f"{who} did not come to where the others wait, for {limit:g} s (run.process_timeout_seconds)\n"
        "  see what hangs there (py-spy dump, nvidia-smi), or raise the limit if it is only slow; the same command "
        "goes on from the last checkpoint"
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
