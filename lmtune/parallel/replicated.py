"""Several processes, each with a replica of the model: gradients are summed, nothing is sharded.

No DistributedDataParallel: what is trained is small, the loss's denominator is global, and ranks may have a different
number of micro-batches, also none. One explicit all-reduce is simpler than undoing an average.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

from lmtune.errors import LmtuneError
from lmtune.io.text import one_line
from lmtune.models.device import default_device, is_out_of_memory
from lmtune.parallel.base import GradientBuffer, WholeModel
from lmtune.parallel.watchdog import Watchdog

T = TypeVar("T")
_FOR_EVER = timedelta(days=365)
_MEET_SECONDS = 900.0  # for all to start; all do the same until then


class Replicated(WholeModel):
    """This rank of several, whose collectives are watched."""

    def __init__(self, timeout_seconds: float) -> None:
        """`timeout_seconds`: how long a rank may show no sign of life while the others wait for it."""
        self.phase, self.works_alone = "start", False  # alone: the others know that they wait for this process
        self.on_failure: Callable[[str], None] | None = None
        seconds = min(2 * timeout_seconds + 60, _MEET_SECONDS)
        on_cpu = default_device().type == "cpu"  # Accelerate's own choice may be another: mps, xpu, npu
        joining = InitProcessGroupKwargs(timeout=timedelta(seconds=seconds))
        try:
            self._accelerator = Accelerator(mixed_precision="no", cpu=on_cpu, kwargs_handlers=[joining])
        except torch.distributed.DistError as error:
            rank, count, *where = map(os.environ.get, ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
            raise LmtuneError(
                f"rank {rank}: {count} processes did not meet at {where[0]}, port {where[1]} within {seconds:g} s: "
                f"{one_line(error)}; what the others printed says why, or their machines do not reach this address"
            ) from error
        self.rank, self.world_size = int(self._accelerator.process_index), int(self._accelerator.num_processes)
        # Accelerate numbers CPUs, and moving a weight to "cpu:1" copies it: it would not stay mapped from its file.
        self.device: torch.device = torch.device("cpu") if on_cpu else self._accelerator.device
        # From here on the watchdog says when to give up, which knows whether a process works.
        torch.distributed.distributed_c10d._set_pg_timeout(_FOR_EVER)
        self._watchdog = Watchdog(self, timeout_seconds)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks to a person."""
        return self.rank == 0

    def sum_gradients(self, buffer: GradientBuffer) -> None:
        """Put the sum over all ranks in the place of `buffer.summed`; allocates nothing."""
        with self.collective():
            torch.distributed.all_reduce(buffer.summed)
            self._wait_for_device()

    def gradient_norm(self, buffer: GradientBuffer) -> float:
        """The 2-norm of the whole gradient, of which every rank has all."""
        return float(torch.nn.utils.get_total_norm(buffer.gradients))

    @contextlib.contextmanager
    def collective(self) -> Iterator[None]:
        """Held during a collective of a library; says why it fails.

        Raises:
            LmtuneError: a peer is gone.
        """
        self._watchdog.enter()
        try:
            yield
        except RuntimeError as error:  # what the backends raise when a process is gone
            if is_out_of_memory(error):
                raise
            raise LmtuneError(f"rank {self.rank}: {self._watchdog.why_apart()}") from error
        self._watchdog.leave()

    def barrier(self) -> None:
        """Go on when every rank is here."""
        with self.collective():
            self._accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the block before the others do."""
        if not self.is_main:
            self.barrier()
        self.works_alone = self.is_main
        try:
            yield
        finally:
            self.works_alone = False
        if self.is_main:
            self.barrier()

    def gather(self, items: list[T]) -> list[T]:
        """The items of all ranks, in their order."""
        with self.collective():
            gathered: list[T] = gather_object(items)
            return gathered

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Put rank 0's `tensor` in the place of this rank's, bit for bit, whatever its type."""
        with self.collective():
            given = tensor.contiguous()
            torch.distributed.broadcast(given.view(torch.uint8), src=0)
            tensor.copy_(given)
            self._wait_for_device()

    def close(self) -> None:
        """Leave the group: gloo's threads abort a process that exits while they run."""
        self._watchdog.close()
        self._accelerator.end_training()

    def _wait_for_device(self) -> None:
        if self.device.type == "cuda":  # there a collective returns before the others have come
            torch.cuda.current_stream().synchronize()
