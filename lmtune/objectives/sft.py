"""Supervised fine-tuning: the cross-entropy of every target, averaged over the targets of the whole step.

loss = -sum of weight * log-probability / sum of weights, both over the targets of the step

The weight of a target is that of its row, 1 unless the row says otherwise.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from lmtune.batching.packing import MicroBatch
from lmtune.batching.plan import Totals
from lmtune.data.types import RowKind
from lmtune.forward.packed import Outputs
from lmtune.objectives.base import LossSum, ObjectiveDefaults


class Sft(ObjectiveDefaults):
    """Answers, or plain text: each sequence by itself, every target alike."""

    kind: ClassVar[str] = "sft"
    rows: ClassVar[RowKind] = "answer"
    metrics: ClassVar[tuple[str, ...]] = ("token_accuracy",)

    def denominator(self, totals: Totals) -> float:
        """The targets of the step, by the weights of their rows: long answers count for their length."""
        return totals.weighted_targets

    def loss(self, outputs: Outputs, batch: MicroBatch, statistic: float = 0.0) -> LossSum:
        """The negative log-probabilities; an error is a target that is not the most likely token."""
        right = outputs.is_top1.sum().float()
        count = torch.full_like(right, len(outputs.is_top1))  # made on the device: no copy to wait for
        loss = -(outputs.logprobs * batch.weights[batch.sequence_of]).sum()
        return LossSum(loss, wrong_targets(outputs, batch), {"token_accuracy": (right, count)})


def wrong_targets(outputs: Outputs, batch: MicroBatch) -> torch.Tensor:
    """`[E]` fp32: of each of the step's examples, how many targets of this batch are not the most likely token."""
    errors = torch.zeros(batch.num_examples, device=outputs.is_top1.device)
    return errors.index_add_(0, batch.example_of[batch.sequence_of], (~outputs.is_top1).float())
