"""The next micro-batches, made in the background while the current one is computed.

Planning a step, reading its rows from disk, packing them and pinning them for the copy to a GPU take milliseconds that
nothing should wait for. One thread does them a few micro-batches ahead, across steps too.

    with BatchPrefetcher(plan, rank=0, rows=data.__getitem__) as prefetcher:
        prefetcher.start(step=1)
        todo = prefetcher.next_step()
        for batch in prefetcher.batches():
            …
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from lmtune.batching.packing import MicroBatch, pack_sequences
from lmtune.batching.plan import Plan, StepPlan, Unit

_JOIN_SECONDS = 10.0
_AHEAD = 3  # micro-batches; each is some kilobytes
_Item = StepPlan | MicroBatch | BaseException | None  # None: the step has no more


class BatchPrefetcher:
    """The steps of a plan, each followed by its micro-batches of one process.

    Attributes:
        plan: of the run; `start` may bring another one.
    """

    def __init__(
        self, plan: Plan, rank: int, rows: Callable[[int], Any], share_prefixes: bool = False, pin: bool = False
    ) -> None:
        """
        Args:
            plan: of the run.
            rank: this process.
            rows: gives a row's tokens.
            share_prefixes: whether a common beginning is laid down once.
            pin: whether tensors go into page-locked memory.
        """
        self.plan, self._rank, self._rows = plan, rank, rows
        self._share_prefixes, self._pin = share_prefixes, pin
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> BatchPrefetcher:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def start(self, step: int, plan: Plan | None = None) -> None:
        """Prepare `step` and those after it, by another plan if one is given; what was prepared before is dropped."""
        self.close()
        self.plan = plan or self.plan
        self._ready: queue.Queue[_Item] = queue.Queue(_AHEAD)
        self._closed, self._error = threading.Event(), None
        arguments = (self.plan, step, self._ready, self._closed)
        self._thread = threading.Thread(target=self._run, args=arguments, name="lmtune-prefetcher", daemon=True)
        self._thread.start()

    def next_step(self) -> StepPlan:
        """What the next step is made of; its batches follow.

        Raises:
            Exception: whatever went wrong while it was prepared.
        """
        step = self._take()
        assert isinstance(step, StepPlan)
        return step

    def batches(self) -> Iterator[MicroBatch]:
        """The micro-batches of the step that `next_step` gave, on the CPU."""
        while (batch := self._take()) is not None:
            assert isinstance(batch, MicroBatch)
            yield batch

    def close(self) -> None:
        """Stop preparing."""
        if self._thread is not None:
            self._closed.set()
            self._thread.join(_JOIN_SECONDS)  # a disk that hangs must not hold up the end of the process
            self._thread = None

    def _take(self) -> StepPlan | MicroBatch | None:
        if self._error is None:
            item = self._ready.get()
            if not isinstance(item, BaseException):
                return item
            self._error = item
        raise self._error  # again too, whoever asks: the thread has ended

    def _batch(self, group: list[Unit], num_examples: int) -> MicroBatch:
        documents = {row: self._rows(row).sequences for row in dict.fromkeys(unit.row for unit in group)}
        return pack_sequences(
            [documents[unit.row][unit.document] for unit in group], [unit.example for unit in group], num_examples,
            self._share_prefixes,
        )  # fmt: skip

    def _run(self, plan: Plan, step: int, ready: queue.Queue[_Item], closed: threading.Event) -> None:
        def offer(item: _Item) -> None:
            while not closed.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue

        try:
            while step <= plan.total_steps and not closed.is_set():
                todo = plan.step(step)
                offer(todo)
                for group in todo.shares[self._rank]:
                    batch = self._batch(group, len(todo.rows))
                    offer(batch.pinned() if self._pin else batch)
                offer(None)
                step += 1
        except BaseException as error:  # belongs to whoever takes the step
            offer(error)
