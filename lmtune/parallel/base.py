"""Ranks: the seam between a step and the processes that compute it together.

parallel = connect(config.parallel, config.run.process_timeout_seconds)
parallel.sum_gradients(buffer)          # the one reduction of a step
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import torch
from torch.distributed.tensor import DTensor

from lmtune.models.tuning.base import TunedModel

T = TypeVar("T")


@dataclass(frozen=True)
class GradientBuffer:
    """All gradients of a step, and what else it sums over the ranks, in one flat fp32 tensor: one collective does.

    The gradient of a parameter that is shared out (DTensor) is summed by its backward pass; here is this rank's part.
    """

    flat: torch.Tensor  # [P + G + M], zeros at first
    parts: list[torch.Tensor]  # of the `.grad` of each parameter that is shared out, views of the first P elements
    whole: list[torch.Tensor]  # the `.grad` of each other one, views of the next G
    summed: torch.Tensor  # [G + M], a view of all that one collective sums
    sums: torch.Tensor  # [M], a view of the rest

    @property
    def gradients(self) -> list[torch.Tensor]:
        """What this rank holds of all of them."""
        return self.parts + self.whole

    @classmethod
    def of(cls, parameters: Mapping[str, torch.nn.Parameter], num_sums: int) -> GradientBuffer:
        """A buffer for `parameters`, whose `.grad` becomes a part of it, and `num_sums` numbers."""
        own = sorted(parameters.values(), key=lambda parameter: not isinstance(parameter, DTensor))
        for parameter in own:
            parameter.grad = None
        with torch.no_grad():
            local = [one.to_local() if isinstance(one, DTensor) else one for one in own]
        size = sum(map(torch.Tensor.numel, local))
        flat = torch.zeros(size + num_sums, device=own[0].device)
        start, parts, whole = 0, list[torch.Tensor](), list[torch.Tensor]()
        for parameter, held in zip(own, local, strict=True):
            grad = flat[start : start + held.numel()].view_as(held)
            start += held.numel()
            if isinstance(parameter, DTensor):
                parts.append(grad)
                parameter.grad = DTensor.from_local(
                    grad, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
                )
            else:
                whole.append(grad)
                parameter.grad = grad
        return cls(flat, parts, whole, flat[sum(map(torch.Tensor.numel, parts)) :], flat[size:])


class Parallel(Protocol):
    """This process among those of the run."""

    rank: int
    world_size: int
    device: torch.device
    phase: str  # what it is doing, for the message about one that hangs; `step N` is held to the time limit
    on_failure: Callable[[str], None] | None  # told the reason when it is ended from outside its main thread
    equal_passes: bool  # whether every rank must make as many passes as the others

    @property
    def load_device(self) -> torch.device:
        """Where a model is loaded, before `shard`."""

    @property
    def scoring(self) -> Parallel:
        """The ranks that share the rows that are scored."""

    def shard(self, model: TunedModel, dtype: torch.dtype) -> None:
        """Keep what this rank has to hold of a model, on its device; after its kernels were chosen, before a pass.

        `dtype` is that of products.
        """

    def passes(self) -> contextlib.AbstractContextManager[None]:
        """Held during forward and backward passes; says why one fails of which all ranks take part."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks to a person."""

    def sum_gradients(self, buffer: GradientBuffer) -> None:
        """Put the sum over all ranks in the place of `buffer.summed`; allocates nothing."""

    def gradient_norm(self, buffer: GradientBuffer) -> float:
        """The 2-norm of the whole gradient."""

    def collective(self) -> contextlib.AbstractContextManager[None]:
        """Held during a collective of a library; says why it fails."""

    def barrier(self) -> None:
        """Go on when every rank is here."""

    def main_first(self) -> contextlib.AbstractContextManager[None]:
        """Rank 0 runs the block before the others do."""

    def gather(self, items: list[T]) -> list[T]:
        """The items of all ranks, in their order."""

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Put rank 0's `tensor` in the place of this rank's, bit for bit, whatever its type."""

    def close(self) -> None:
        """Leave the group."""


class WholeModel:
    """What is alike for every rank that holds the whole model."""

    equal_passes = False
    device: torch.device

    @property
    def load_device(self) -> torch.device:
        """See `Parallel`."""
        return self.device

    @property
    def scoring(self) -> Parallel:
        """See `Parallel`: all ranks together."""
        return cast(Parallel, self)

    def shard(self, model: TunedModel, dtype: torch.dtype) -> None:
        """See `Parallel`: there is nothing to share out."""

    def passes(self) -> contextlib.AbstractContextManager[None]:
        """See `Parallel`: no rank waits for another one's."""
        return contextlib.nullcontext()
