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
from lmtune.models.free_memory import is_out_of_memory

_NUM_SUMS = 5  # behind the gradients in the buffer: loss, right tokens, right sequences, out of memory, interrupted
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
    flat, grads = _gradient_buffer(parameters)
    sums, short_of_memory = [0.0, 0.0, 0.0], False
    try:
        with forward.ready():
            rows = [_accumulate(forward, batch.to(flat.device)) for batch in batches]
        # added up in 64 bit on the host, as not every device has it; here, where what the GPU still has to say is heard
        for row in torch.stack(rows).tolist() if rows else []:
            sums = [one + other for one, other in zip(sums, row, strict=True)]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        short_of_memory = True
    # from here on nothing of the gradient's size is allocated: a process that failed would leave the others waiting
    sums += [float(short_of_memory), float(is_interrupted())]
    if accelerator.num_processes > 1:
        flat[-_NUM_SUMS:] = torch.tensor(sums)
        accelerator.add_over_processes(flat)
        sums = flat[-_NUM_SUMS:].tolist()
    torch._foreach_div_(grads, num_trained)
    grad_norm = float(torch.nn.utils.get_total_norm(grads))
    loss, tokens, sequences, out_of_memory, stop = sums
    return StepSums(loss / num_trained, round(tokens), round(sequences), grad_norm, out_of_memory > 0, stop > 0)


def _gradient_buffer(parameters: Mapping[str, torch.nn.Parameter]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Zeros for all gradients in one piece, with `_NUM_SUMS` places more; each `.grad` becomes a part of it.

    Returns:
        The buffer, flat, and the gradients.
    """
    own = list(parameters.values())
    for parameter in own:
        parameter.grad = None
    flat = torch.zeros(sum(parameter.numel() for parameter in own) + _NUM_SUMS, device=own[0].device)
    start, grads = 0, []
    for parameter in own:
        grads.append(flat[start : start + parameter.numel()].view_as(parameter))
        parameter.grad = grads[-1]
        start += parameter.numel()
    return flat, grads


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
    """Add one micro-batch's gradients; returns its sum of losses, right tokens and right sequences, `[3]` in fp32."""
    scores = forward(batch)
    scores.total.backward()  # type: ignore[no-untyped-call]
    sequences = count_correct_sequences(scores.correct, batch)
    return torch.stack([scores.total.detach().float(), scores.correct.sum().float(), sequences.float()])
