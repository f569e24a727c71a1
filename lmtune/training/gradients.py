"""The gradients of one optimizer step, whatever micro-batches and processes it is cut into.

    loss = sum of token losses / number of trained tokens in the whole step

The denominator is known from the plan, so each process adds up its part and one sum over all processes, in a single
flat buffer, finishes the step: gradients, loss, counts, and the flags that make all processes stop or go on together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmtune.data.packing import MicroBatch, pack
from lmtune.kernels.packed_forward import PackedForward, count_correct_sequences

Rows = Callable[[int], Any]  # row number -> TokenizedExample


@dataclass(frozen=True)
class StepSums:
    """What one step's examples add up to over all processes.

    Attributes:
        loss: mean over the step's trained tokens, in nats.
        correct_tokens: trained tokens that were the model's first choice.
        correct_sequences: examples all of whose trained tokens were.
        grad_norm: 2-norm of the adapter's gradient before clipping.
        out_of_memory, interrupted: whether any process ran out of memory, or was asked to stop.
    """

    loss: float
    correct_tokens: int
    correct_sequences: int
    grad_norm: float
    out_of_memory: bool
    interrupted: bool

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient may be used."""
        return bool(torch.tensor([self.loss, self.grad_norm]).isfinite().all())


def step_gradients(
    forward: PackedForward,
    parameters: Mapping[str, torch.nn.Parameter],
    batches: Iterable[MicroBatch],
    num_trained: int,
    accelerator: Any,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> StepSums:
    """Leave the step's gradient in `.grad` of every parameter, the same on all processes.

    Args:
        forward: the model.
        parameters: the trainable parameters, fp32.
        batches: this process's micro-batches, on any device.
        num_trained: trained tokens of the whole step, over all processes.
        accelerator: the processes.
        is_interrupted: whether this process was asked to stop; looked at when its gradients are there.
    """
    for parameter in parameters.values():
        parameter.grad = None
    device = next(iter(parameters.values())).device
    sums = torch.zeros(5, dtype=torch.float64, device=device)  # loss, tokens, sequences, out of memory, interrupted
    try:
        with forward.ready():
            for batch in batches:
                sums[:3] += _accumulate(forward, batch.to(device))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sums[3] = 1.0
    sums[4] = float(is_interrupted())
    _sum_over_processes(parameters, sums, accelerator)
    grads = [p.grad for p in parameters.values() if p.grad is not None]
    torch._foreach_div_(grads, num_trained)
    sums[0] /= num_trained
    norm = torch.nn.utils.get_total_norm(grads)
    loss, tokens, sequences, out_of_memory, stop, grad_norm = torch.cat([sums, norm[None].double()]).tolist()
    return StepSums(loss, round(tokens), round(sequences), grad_norm, out_of_memory > 0, stop > 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was too small: a GPU's allocator says so by its type, a CPU's in words."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def find_offenders(
    forward: PackedForward, parameters: Mapping[str, torch.nn.Parameter], share: Sequence[Sequence[int]], rows: Rows
) -> list[str]:
    """The rows of this process, as `file:line`, whose own loss or gradient is not finite; leaves no gradient behind."""
    device = next(iter(parameters.values())).device
    found = []
    with forward.ready():
        for row in (row for group in share for row in group):
            for parameter in parameters.values():
                parameter.grad = None
            loss, _, _ = _accumulate(forward, pack([rows(row)]).to(device)).tolist()
            grads = [p.grad for p in parameters.values() if p.grad is not None]
            if not (torch.tensor(loss).isfinite() and all(bool(grad.isfinite().all()) for grad in grads)):
                found.append(str(rows(row).where))
    for parameter in parameters.values():
        parameter.grad = None
    return found


def _accumulate(forward: PackedForward, batch: MicroBatch) -> torch.Tensor:
    """Add one micro-batch's gradients; returns its sum of losses, right tokens and right sequences."""
    scores = forward(batch)
    scores.total.backward()  # type: ignore[no-untyped-call]
    sequences = count_correct_sequences(scores.correct, batch)
    return torch.stack([scores.total.detach().double(), scores.correct.sum().double(), sequences.double()])


def _sum_over_processes(parameters: Mapping[str, torch.nn.Parameter], sums: torch.Tensor, accelerator: Any) -> None:
    """Sum gradients and `sums[5]` over all processes, in place, with one all-reduce."""
    for parameter in parameters.values():
        if parameter.grad is None:  # a process without rows, or a parameter that no row used
            parameter.grad = torch.zeros_like(parameter)
    if accelerator.num_processes == 1:
        return
    grads = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    flat = torch.cat([*(grad.flatten() for grad in grads), sums.float()])
    flat = accelerator.reduce(flat, reduction="sum")
    start = 0
    for grad in grads:
        grad.copy_(flat[start : start + grad.numel()].view_as(grad))
        start += grad.numel()
    sums.copy_(flat[start:])
