"""What a whole row is: its class, its classes, or a number, read off its last token.

    classification  cross-entropy of the right class; where labels are lists, the mean over all classes of the binary
                    cross-entropy of each, as of transformers' classifiers
    regression      (value - label)²

The sum is over rows, the denominator their number, by weight. With `class_weights: balanced` a row of class c counts
W / (K Wc) times, where Wc is the weight of all rows of c, W of all and K the number of classes: every class has the
same share in the loss, and the weights are 1 on average, so the denominator stays. Of several classes a row, having
and not having each one are balanced in the same way.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from lmtune.batching.packing import MicroBatch, Reads
from lmtune.config.schema import ClassificationConfig
from lmtune.data.labels import Classes, Labels, class_numbers, label_values
from lmtune.data.types import ExampleStore, RowKind, WithValues
from lmtune.forward.packed import Outputs
from lmtune.models.head import Head
from lmtune.objectives.base import LossSum, ObjectiveDefaults, SequenceLogprobs, sum_of_rows

Float32 = npt.NDArray[np.float32]


class _OverRows(ObjectiveDefaults):
    """What the objectives over labelled rows share; each says what its targets are, and what a row costs."""

    rows: ClassVar[RowKind] = "labelled"
    reads: ClassVar[Reads] = "last_token"
    metrics: ClassVar[tuple[str, ...]]

    def __init__(self, head: Head) -> None:
        self.head = head

    def loss(self, outputs: Outputs, batch: MicroBatch, statistic: float = 0.0) -> LossSum:
        """The losses of the rows, and the mean of the one metric."""
        assert outputs.scores is not None
        losses, measured, wrong = self.of_rows(outputs.scores, batch.values)
        (name,) = self.metrics
        return sum_of_rows(losses, batch.weights, wrong, batch.example_of, batch.num_examples, **{name: measured})

    @abc.abstractmethod
    def of_rows(
        self, scores: torch.Tensor, values: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each row of `scores[S, K]` its loss, its metric, and whether it is wrong, `[S]` each."""


class Classification(_OverRows):
    """One class a row, or several where labels are lists."""

    kind: ClassVar[str] = "classification"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    def __init__(self, settings: ClassificationConfig, head: Head) -> None:
        super().__init__(head)
        self.settings, self.classes = settings, Classes(head.labels, head.kind == "multi_label")

    def precompute(self, store: ExampleStore, logprobs: SequenceLogprobs) -> ExampleStore:
        """The numbers of the classes beside the tokens, and how much each counts."""
        target = class_numbers(self.classes, labels_of(store), store.location)
        if self.settings.class_weights == "none":
            return WithValues(store, target=target)
        weights = store.sequences.weights
        balanced = balancing(target, len(self.classes.names), np.ones(len(store)) if weights is None else weights)
        return WithValues(store, target=target, class_weight=balanced)

    def of_rows(
        self, scores: torch.Tensor, values: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `_OverRows`."""
        target = values["target"]
        weight = values.get("class_weight", torch.ones_like(target))
        if self.classes.many:
            wrong = ((scores > 0) != (target > 0)).any(-1)
            losses = F.binary_cross_entropy_with_logits(scores, target, weight, reduction="none").mean(-1)
        else:
            wrong = scores.argmax(-1) != target.long()
            losses = F.cross_entropy(scores, target.long(), reduction="none") * weight
        return losses, ~wrong, wrong


class Regression(_OverRows):
    """A number a row; right is what rounds to it, within a half."""

    kind: ClassVar[str] = "regression"
    metrics: ClassVar[tuple[str, ...]] = ("mean_absolute_error",)

    def precompute(self, store: ExampleStore, logprobs: SequenceLogprobs) -> ExampleStore:
        """The numbers beside the tokens."""
        return WithValues(store, target=label_values(labels_of(store), store.location))

    def of_rows(
        self, scores: torch.Tensor, values: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `_OverRows`."""
        away = scores[:, 0] - values["target"]
        return away**2, away.abs(), away.abs() > 0.5


def labels_of(store: ExampleStore) -> Labels:
    """Of every row; of rows on disk without reading their tokens."""
    known: Labels | None = getattr(store, "labels", None)
    return [store[row].label for row in range(len(store))] if known is None else known


def balancing(target: Float32, num_classes: int, weights: npt.NDArray[np.float64]) -> Float32:
    """How much each row counts by its class `[N]`, or by each of its classes `[N, K]`, so that all count alike.

    Args:
        target: the class of each row `[N]`, or which it has `[N, K]`.
        num_classes: K.
        weights: of the rows `[N]`.
    """
    total = weights.sum()
    if target.ndim == 1:
        of_class = np.bincount(target.astype(int), weights, num_classes)
        share = total / np.maximum(of_class, 1e-12) / max(1, np.count_nonzero(of_class))
        return np.asarray(share[target.astype(int)], dtype=np.float32)
    having = weights @ target  # [K]
    with np.errstate(divide="ignore"):
        both = total / 2 / having, total / 2 / (total - having)
    return np.asarray(np.where(target > 0, *both), dtype=np.float32)
