"""The gradients of one optimizer step, whatever micro-batches and processes it is cut into.

    loss = sum of token losses / number of trained tokens in the whole step

The denominator is known from the plan, so each process adds up its part and one sum over all processes, in a single
flat buffer, finishes the step: gradients, loss, counts, and the flags that make all processes stop or go on together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmtune.batching.packing import MicroBatch, pack_sequences
from lmtune.batching.plan import Unit
from lmtune.forward.packed import PackedForward, count_wrong_tokens
from lmtune.models.device import is_out_of_memory

_NUM_SUMS = 4  # loss, right tokens, out of memory, interrupted
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
    num_targets: int,
    num_examples: int,
    accelerator: Any,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> StepSums:
    """Leave the step's gradient in `.grad` of every parameter, the same on all processes.

    Args:
        forward: the model.
        parameters: the trainable parameters, fp32.
        batches: this process's micro-batches, on any device.
        num_targets: trained tokens of the whole step, over all processes.
        num_examples: examples of the whole step; the sequences of one may be anywhere in it.
        accelerator: the processes.
        is_interrupted: whether this process was asked to stop; looked at when its gradients are there.
    """
    flat, grads, wrong = _step_buffer(parameters, num_examples)
    sums, short_of_memory = [0.0, 0.0], False
    try:
        with forward.ready():
            rows = [_accumulate(forward, batch.to(flat.device), wrong) for batch in batches]
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
    sequences = int((wrong == 0).sum())
    torch._foreach_div_(grads, num_targets)
    grad_norm = float(torch.nn.utils.get_total_norm(grads))
    loss, tokens, out_of_memory, stop = sums
    return StepSums(loss / num_targets, round(tokens), sequences, grad_norm, out_of_memory > 0, stop > 0)


def _step_buffer(
    parameters: Mapping[str, torch.nn.Parameter], num_examples: int
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """One flat tensor of zeros for all that is summed over the processes; each `.grad` becomes a part of it.

    Returns:
        The tensor, whose last `_NUM_SUMS` places are free; the gradients in it; and the wrong tokens of each example.
    """
    own = list(parameters.values())
    for parameter in own:
        parameter.grad = None
    size = sum(parameter.numel() for parameter in own)
    flat = torch.zeros(size + num_examples + _NUM_SUMS, device=own[0].device)
    start, grads = 0, []
    for parameter in own:
        grads.append(flat[start : start + parameter.numel()].view_as(parameter))
        parameter.grad = grads[-1]
        start += parameter.numel()
    return flat, grads, flat[size : size + num_examples]


def find_nonfinite_examples(
    forward: PackedForward, parameters: Mapping[str, torch.nn.Parameter], share: Sequence[Sequence[Unit]], rows: Rows
) -> list[str]:
    """The rows of this process, as `file:line`, whose own loss or gradient is not finite; leaves no gradient behind."""
    found = []
    with forward.ready():
        for unit in sorted(unit for group in share for unit in group):
            flat, grads, wrong = _step_buffer(parameters, 1)
            row = rows(unit.row)
            batch = pack_sequences([row.sequences[unit.document]], [0], 1)
            loss, _ = _accumulate(forward, batch.to(flat.device), wrong).tolist()
            if not (math.isfinite(loss) and all(bool(grad.isfinite().all()) for grad in grads)):
                found.append(row.location)
    for parameter in parameters.values():
        parameter.grad = None
    return list(dict.fromkeys(found))


def _accumulate(forward: PackedForward, batch: MicroBatch, wrong: torch.Tensor) -> torch.Tensor:
    """Add one micro-batch's gradients, and to `wrong[E]` its wrong tokens; returns its sum of losses and how many are
    right, `[2]` in fp32."""
    scores = forward(batch)
    scores.total.backward()  # type: ignore[no-untyped-call]
    wrong += count_wrong_tokens(scores.correct, batch)
    return torch.stack([scores.total.detach().float(), scores.correct.sum().float()])
