"""The next micro-batches, made in the background while the current one is computed.

Planning a step, reading its rows from disk, packing them and pinning them for the copy to a GPU take milliseconds that
nothing should wait for. One thread does them a few micro-batches ahead, across steps too.

    with BatchPrefetcher(planner, rank=0, data=data) as prefetcher:
        prefetcher.start(step=1)
        plan = prefetcher.next_step()
        for batch in prefetcher.batches():
            …
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

from lmtune.batching.packing import MicroBatch, Reads, pack
from lmtune.batching.plan import Planner, StepPlan, Unit
from lmtune.data.types import TokenizedExample

_JOIN_SECONDS = 10.0
_AHEAD = 3  # micro-batches; each is some kilobytes
_Item = StepPlan | MicroBatch | BaseException | None  # None: the step has no more


class Examples(Protocol):
    """What is read of a data set."""

    def __getitem__(self, index: int) -> TokenizedExample: ...


def pack_units(
    data: Examples, units: Sequence[Unit], num_examples: int, share_prefixes: bool = False, reads: Reads = "targets"
) -> MicroBatch:
    """The micro-batch of some units of a step of `num_examples` examples; each row is read once."""
    read = {row: data[row] for row in dict.fromkeys(unit.row for unit in units)}
    chosen = [(unit, sequence) for unit in units for sequence in unit.sequences]
    return pack(
        [read[unit.row].sequences[sequence] for unit, sequence in chosen], [unit.example for unit, _ in chosen],
        num_examples, share_prefixes, [read[unit.row].values for unit, _ in chosen],
        [read[unit.row].weight for unit, _ in chosen], reads,
    )  # fmt: skip


class BatchPrefetcher:
    """The steps of a plan, each followed by its micro-batches of one rank, which `pin` puts into page-locked memory."""

    def __init__(
        self, planner: Planner, rank: int, data: Examples, share_prefixes: bool = False, pin: bool = False,
        reads: Reads = "targets",
    ) -> None:  # fmt: skip
        self.planner, self._rank, self._data, self._reads = planner, rank, data, reads
        self._share_prefixes, self._pin = share_prefixes, pin
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> BatchPrefetcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self, step: int, planner: Planner | None = None) -> None:
        """Prepare `step` and those after it, by another plan if one is given; what was prepared before is dropped."""
        self.close()
        self.planner = planner or self.planner
        self._ready: queue.Queue[_Item] = queue.Queue(_AHEAD)
        self._closed, self._error = threading.Event(), None
        arguments = (self.planner, step, self._ready, self._closed)
        self._thread = threading.Thread(target=self._run, args=arguments, name="lmtune-prefetch", daemon=True)
        self._thread.start()

    def next_step(self) -> StepPlan:
        """What the next step is made of; its batches follow. Raises whatever went wrong while it was prepared."""
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

    def _run(self, planner: Planner, step: int, ready: queue.Queue[_Item], closed: threading.Event) -> None:
        def offer(item: _Item) -> None:
            while not closed.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue

        try:
            while step <= planner.total_steps and not closed.is_set():
                plan = planner.step(step)
                offer(plan)
                for units in plan.micro_batches[self._rank]:
                    batch = pack_units(self._data, units, plan.totals.examples, self._share_prefixes, self._reads)
                    offer(batch.pinned() if self._pin else batch)
                offer(None)
                step += 1
        except BaseException as error:  # belongs to whoever takes the step
            offer(error)
