"""One process: nothing to reduce, nobody to wait for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from lmtune.models.device import default_device
from lmtune.parallel.base import GradientBuffer, WholeModel

T = TypeVar("T")


class Single(WholeModel):
    """The only process of a run."""

    rank, world_size = 0, 1

    def __init__(self, device: torch.device | None = None, is_main: bool = True) -> None:
        self.device, self.is_main = default_device() if device is None else device, is_main
        self.phase = "start"
        self.on_failure: Callable[[str], None] | None = None

    def sum_gradients(self, buffer: GradientBuffer) -> None:
        """The sum of one."""

    def gradient_norm(self, buffer: GradientBuffer) -> float:
        """The 2-norm of the whole gradient."""
        return float(torch.nn.utils.get_total_norm(buffer.gradients))

    def collective(self) -> contextlib.AbstractContextManager[None]:
        """Of one."""
        return contextlib.nullcontext()

    def barrier(self) -> None:
        """Everybody is here."""

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """This is rank 0."""
        yield

    def gather(self, items: list[T]) -> list[T]:
        """These."""
        return items

    def broadcast(self, tensor: torch.Tensor) -> None:
        """This is rank 0's."""

    def close(self) -> None:
        """Nothing to leave."""
