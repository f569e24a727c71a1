"""What a step minimizes: the seam between the step, which knows tokens, and a loss, which knows what they are for.

    class Dpo:                                   # lmtune/objectives/preference.py
        def loss(self, outputs, batch, statistic):
            return LossSum(total, errors, {"reward_margin": (margins.sum(), count)})

An objective gives a *sum* over its examples and a *denominator* that the plan knows before the step begins; the step
divides once, at its end. So packing, shared prefixes, exact resume and equality over ranks hold for every objective.
That a loss is a function of per-token log-probabilities is Tinker's idea (`forward_backward_custom`).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from lmtune.batching.packing import MicroBatch, Reads
from lmtune.batching.plan import Totals, each_alone
from lmtune.data.types import ExampleStore, RowKind
from lmtune.forward.packed import Outputs
from lmtune.models.head import Head

# The log-probability of each sequence's targets `[S]` under the model as it is, in the order of `store.sequences`.
SequenceLogprobs = Callable[[ExampleStore], npt.NDArray[np.float64]]


@dataclass(frozen=True)
class LossSum:
    """What the examples of one micro-batch add to the step.

    Attributes:
        total: a scalar, the SUM of their losses, with a gradient; the step divides it by the denominator.
        errors: `[E]` fp32 without a gradient, of each of the step's examples; added up over all micro-batches and
            ranks, an example without any counts as right (`sequence_accuracy`).
        metrics: name -> (sum, count), each a scalar without a gradient; the names are those of `Objective.metrics`.
        parts: the loss and the metrics of each row by itself, where the objective is over rows: name -> (value, how
            much it counts), `[B]` each without a gradient.
        rows: `[B]`, the numbers of these rows in the step.
    """

    total: torch.Tensor
    errors: torch.Tensor
    metrics: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    parts: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    rows: torch.Tensor | None = None


def sum_of_rows(
    losses: torch.Tensor, weights: torch.Tensor, wrong: torch.Tensor, examples: torch.Tensor, num_examples: int,
    **metrics: torch.Tensor,
) -> LossSum:  # fmt: skip
    """What B rows, or pairs, of a micro-batch add to the step.

    Args:
        losses, weights, wrong: `[B]` each; `wrong` says of which there is an error.
        examples: `[B]`, their numbers in the step.
        num_examples: of the step.
        metrics: `[B]` each, whose mean is shown.
    """
    errors = torch.zeros(num_examples, device=losses.device).index_add_(0, examples, wrong.float())
    count = torch.full_like(losses[:1], len(losses))[0]  # made on the device: no copy to wait for
    found = {name: (values.detach().float().sum(), count) for name, values in metrics.items()}
    weighted = losses * weights
    ones = torch.ones_like(weights)
    parts = {name: (values.detach(), ones) for name, values in metrics.items()}
    return LossSum(weighted.sum(), errors, found, {"loss": (weighted.detach(), weights), **parts}, examples)


class Objective(Protocol):
    """What is trained from an example.

    Attributes:
        kind: its name in the config.
        rows: the kind of rows that it is over.
        reads: where outputs are read: before each target, or, of a classifier, at the last token of each sequence.
        two_passes: the losses need a statistic of the whole step, from a pass over it without gradients.
        head: what the outputs of the classifier are that it trains; None for a language model.
        metrics: the names of its metrics, each the quotient of a sum and a count.
        selection: which score of the validation rows picks the best step, and whether it is the least or the greatest.
    """

    kind: ClassVar[str]
    rows: ClassVar[RowKind]
    reads: ClassVar[Reads]
    head: Head | None
    two_passes: ClassVar[bool]
    metrics: ClassVar[tuple[str, ...]]
    selection: ClassVar[tuple[str, Literal["min", "max"]]]

    def units(self, num_sequences: int) -> Sequence[Sequence[int]]:
        """Which of an example's sequences, of which there are so many, share a micro-batch."""

    def denominator(self, totals: Totals) -> float:
        """What the step's sum is divided by."""

    def precompute(self, store: ExampleStore, logprobs: SequenceLogprobs) -> ExampleStore:
        """The data with what is computed once, before the first step, stored beside the tokens."""

    def statistic(self, outputs: Outputs, batch: MicroBatch) -> tuple[torch.Tensor, int]:
        """With `two_passes`: the sum and the number of what the losses of a step need the mean of."""

    def loss(self, outputs: Outputs, batch: MicroBatch, statistic: float = 0.0) -> LossSum:
        """The loss of a micro-batch from the log-probabilities of its targets.

        `statistic` is the mean of the whole step, over all ranks, of what `statistic` gives.
        """


class ObjectiveDefaults(abc.ABC):
    """What objectives have where they say nothing else: each sequence by itself, over the rows by weight."""

    reads: ClassVar[Reads] = "targets"
    two_passes: ClassVar[bool] = False
    selection: ClassVar[tuple[str, Literal["min", "max"]]] = ("loss", "min")
    head: Head | None = None

    def units(self, num_sequences: int) -> Sequence[Sequence[int]]:
        """Each sequence by itself."""
        return each_alone(num_sequences)

    def denominator(self, totals: Totals) -> float:
        """The rows, or pairs, by weight."""
        return totals.weight

    def precompute(self, store: ExampleStore, logprobs: SequenceLogprobs) -> ExampleStore:
        """Nothing."""
        return store

    def statistic(self, outputs: Outputs, batch: MicroBatch) -> tuple[torch.Tensor, int]:
        """Nothing, as without `two_passes` nobody asks."""
        return batch.weights.new_zeros(()), 1

    @abc.abstractmethod
    def loss(self, outputs: Outputs, batch: MicroBatch, statistic: float = 0.0) -> LossSum:
        """See `Objective`."""
