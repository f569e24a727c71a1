"""The gradients of one optimizer step, whatever micro-batches and ranks it is cut into.

    gradient = gradient of (sum of the losses of all examples) / denominator

The denominator is known from the plan, so each rank adds up its part and one sum over all ranks, in a single flat
buffer, finishes the step: gradients, loss, metrics, and the flags that make all ranks stop or go on together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lmtune.batching.packing import MicroBatch, pack
from lmtune.batching.plan import Totals, Unit
from lmtune.batching.prefetch import pack_units
from lmtune.data.types import ExampleStore, TokenSequence
from lmtune.forward.packed import PackedForward
from lmtune.models.device import is_out_of_memory
from lmtune.objectives.base import LossSum, Objective
from lmtune.parallel.base import GradientBuffer, Parallel

Parameters = Mapping[str, torch.nn.Parameter]


@dataclass(frozen=True)
class StepResult:
    """What one step's examples add up to over all ranks."""

    loss: float  # the sum over the step's examples / the objective's denominator; of SFT in nats a target
    num_correct: int  # examples without an error
    metrics: Mapping[str, float]  # the objective's, each a sum / its count
    grad_norm: float  # 2-norm of the gradient before clipping
    out_of_memory: bool  # on any rank
    interrupted: bool  # any rank was asked to stop

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient may be used."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def step_gradients(
    forward: PackedForward,
    objective: Objective,
    parameters: Parameters,
    batches: Iterable[MicroBatch],
    totals: Totals,
    parallel: Parallel,
    is_interrupted: Callable[[], bool] = lambda: False,
    num_passes: int = 0,
) -> StepResult:
    """Leave the step's gradient in `.grad` of every parameter (fp32), the same on all ranks.

    `batches` are this rank's micro-batches, on any device; `totals` are of the whole step, over all ranks.
    `is_interrupted` tells whether this process was asked to stop; it is asked when the gradients are there. Where ranks
    gather weights for each other, `num_passes` is the most micro-batches of a rank; those with fewer make empty passes.
    """
    num_sums = 1 + 2 * len(objective.metrics)  # the loss, and sum and count of each metric
    buffer = GradientBuffer.of(parameters, totals.examples + num_sums + 2)
    errors = buffer.sums[: totals.examples]
    sums, short_of_memory, statistic = [0.0] * num_sums, False, 0.0
    if objective.two_passes:
        batches = list(batches)
        statistic = _statistic(forward, objective, batches, parallel, num_passes)
    try:
        with forward.context(), parallel.passes():
            rows = [
                _accumulate(forward, objective, batch.to(buffer.flat.device), errors, statistic) for batch in batches
            ]
            for _ in range(num_passes - len(rows)):
                (_empty_pass(forward, objective) * 0).backward()  # type: ignore[no-untyped-call]
        # added up in 64 bit on the host, as not every device has it; here, where what the GPU still has to say is heard
        for row in torch.stack(rows).tolist() if rows else []:
            sums = [one + other for one, other in zip(sums, row, strict=True)]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        short_of_memory = True
    # from here on nothing of the gradient's size is allocated: a rank that failed would leave the others waiting
    sums += [float(short_of_memory), float(is_interrupted())]
    if parallel.world_size > 1:
        buffer.sums[totals.examples :] = torch.tensor(sums)
        parallel.sum_gradients(buffer)
        sums = buffer.sums[totals.examples :].tolist()
    correct = int((errors == 0).sum())
    denominator = objective.denominator(totals)
    torch._foreach_div_(buffer.gradients, denominator)
    loss, *pairs, out_of_memory, stop = sums
    metrics = {
        name: total / count if count else 0.0
        for name, total, count in zip(objective.metrics, pairs[::2], pairs[1::2], strict=True)
    }
    return StepResult(loss / denominator, correct, metrics, parallel.gradient_norm(buffer), out_of_memory > 0, stop > 0)


def find_nonfinite_examples(
    forward: PackedForward, objective: Objective, parameters: Parameters, micro_batches: Sequence[Sequence[Unit]],
    data: ExampleStore, parallel: Parallel, others: tuple[int, int] = (0, 0),
) -> list[str]:  # fmt: skip
    """The examples of this rank, as `file:line`, whose own loss or gradient is not finite; leaves no gradient.

    Where ranks gather weights for each other, each makes empty passes while the others try theirs: `others` is how many
    the ranks before and after it have. So a gradient of which ranks have parts is one example's.
    """
    own = sorted(unit for units in micro_batches for unit in units)
    turns: list[Unit | None] = [*[None] * others[0], *own, *[None] * others[1]]
    is_bad = []
    with forward.context(), parallel.passes():
        for unit in turns:
            buffer, loss = GradientBuffer.of(parameters, 1), 0.0
            if unit is None:
                (_empty_pass(forward, objective) * 0).backward()  # type: ignore[no-untyped-call]
            else:
                batch = pack_units(data, [unit._replace(example=0)], 1, reads=objective.reads).to(buffer.flat.device)
                loss = float(_accumulate(forward, objective, batch, buffer.sums)[0])
            is_bad.append(not (math.isfinite(loss) and all(bool(grad.isfinite().all()) for grad in buffer.gradients)))
    if parallel.equal_passes:
        is_bad = [any(of_ranks) for of_ranks in zip(*parallel.gather([is_bad]), strict=True)]
    for parameter in parameters.values():
        parameter.grad = None
    found = [data[unit.row].location for unit, bad in zip(turns, is_bad, strict=True) if unit is not None and bad]
    return list(dict.fromkeys(found))


@torch.no_grad()
def _statistic(
    forward: PackedForward, objective: Objective, batches: Sequence[MicroBatch], parallel: Parallel, num_passes: int
) -> float:  # fmt: skip
    """The mean over the whole step of what the objective's losses need of it; NaN where a rank has no memory for it.

    It is computed as the losses are, dropout included, and with the same numbers drawn.
    """
    total, count, state = 0.0, 0, torch.get_rng_state()
    try:
        with forward.context(), parallel.passes():
            for _ in range(num_passes - len(batches)):
                _empty_pass(forward, objective)
            for batch in batches:
                own = batch.to(forward.device)
                part, number = objective.statistic(forward(own), own)
                total, count = total + float(part), count + number
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        total = math.nan
    torch.set_rng_state(state)
    of_ranks = parallel.gather([(total, count)])
    return sum((part for part, _ in of_ranks), 0.0) / max(1, sum(number for _, number in of_ranks))


def _empty_pass(forward: PackedForward, objective: Objective) -> torch.Tensor:
    """A pass over two tokens, for the weights that it gathers."""
    nothing = TokenSequence(np.zeros(2, np.int32), np.array([False, True]))
    outputs = forward(pack([nothing], [0], 1, reads=objective.reads).to(forward.device))
    return outputs.logprobs.sum() if outputs.scores is None else outputs.scores.sum()


def _accumulate(
    forward: PackedForward, objective: Objective, batch: MicroBatch, errors: torch.Tensor, statistic: float = 0.0
) -> torch.Tensor:  # fmt: skip
    """Add one micro-batch's gradients, and its errors to `errors[E]`; returns its sums `[1 + 2 M]` in fp32."""
    result: LossSum = objective.loss(forward(batch), batch, statistic)
    result.total.backward()  # type: ignore[no-untyped-call]
    errors += result.errors
    pairs = [part.float() for name in objective.metrics for part in result.metrics[name]]
    return torch.stack([result.total.detach().float(), *pairs])
