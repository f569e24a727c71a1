"""A reward model: a number for each answer, higher for the better one of a pair.

    -log sigmoid(reward of the chosen answer - reward of the rejected one)

The model of Bradley and Terry. The reward is read off an answer's last token; the sum is over pairs, the denominator
their number, by weight. A pair shares a micro-batch, and so its prompt: https://arxiv.org/abs/2203.02155.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F

from lmtune.batching.packing import MicroBatch, Reads
from lmtune.data.types import RowKind
from lmtune.forward.packed import Outputs
from lmtune.models.head import Head
from lmtune.objectives.base import LossSum, ObjectiveDefaults, sum_of_rows
from lmtune.objectives.preference import PAIR


class Reward(ObjectiveDefaults):
    """Pairs of answers."""

    kind: ClassVar[str] = "reward"
    rows: ClassVar[RowKind] = "pair"
    reads: ClassVar[Reads] = "last_token"
    metrics: ClassVar[tuple[str, ...]] = ("pair_accuracy", "reward_chosen", "reward_rejected", "reward_margin")

    def __init__(self, head: Head) -> None:
        self.head = head

    def units(self, num_sequences: int) -> Sequence[Sequence[int]]:
        """A pair."""
        return PAIR

    def loss(self, outputs: Outputs, batch: MicroBatch, statistic: float = 0.0) -> LossSum:
        """The losses of the pairs; an error is a pair whose chosen answer has no higher reward."""
        assert outputs.scores is not None
        chosen, rejected = outputs.scores[::2, 0], outputs.scores[1::2, 0]
        losses = -F.logsigmoid(chosen - rejected)
        wrong = chosen <= rejected
        return sum_of_rows(
            losses, batch.weights[::2], wrong, batch.example_of[::2], batch.num_examples, pair_accuracy=~wrong,
            reward_chosen=chosen, reward_rejected=rejected, reward_margin=chosen - rejected,
        )  # fmt: skip
