"""Who answers: one adapter, the base, or several adapters over one base whose probabilities become one.

    AS_IS                                      # the model as it is, with the adapter that is active on it
    Members((BASE,))                           # the base
    Members(("a", "b"), (0.7, 0.3))            # the mean of what two say
    Members(("a", "b", "c"), method="vote")    # what most of them say

A mean is of probabilities, not of logits: https://arxiv.org/abs/1612.01474, 2.4. A vote counts for the most probable
class or token of each member; where several have equally many votes, the mean decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from lmtune.models.head import HeadKind

BASE = "__base__"  # PEFT's name for the base among adapters
Method = Literal["mean", "vote"]
_TIE = 1e-4  # the share of the mean beside votes


@dataclass(frozen=True)
class Members:
    """Who answers a request.

    Attributes:
        adapters: `[M]`, the names of the adapters on the model, or `BASE`; none is the model as it is.
        weights: `[M]`, how much each counts; none is equally much.
        method: `mean` of the probabilities, or `vote` for the most probable.
    """

    adapters: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    method: Method = "mean"

    @property
    def is_ensemble(self) -> bool:
        """Whether several answer together."""
        return len(self.adapters) > 1

    def combine(self, probabilities: torch.Tensor) -> torch.Tensor:
        """What all say together, `[..., K]` fp64, of their `probabilities[M, ..., K]`, which sum up to 1 over K."""
        probabilities = probabilities.double()
        mean = self.mean(probabilities)
        if self.method == "mean":
            return mean
        votes = torch.zeros_like(probabilities).scatter_(-1, probabilities.argmax(-1, keepdim=True), 1)
        return (1 - _TIE) * self.mean(votes) + _TIE * mean

    def next_token(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `[V]` of all together from those of each, `[M, V]`."""
        return logits[0] if len(logits) == 1 else self.combine(logits.softmax(-1)).log()

    def outputs(self, kind: HeadKind, scores: torch.Tensor) -> torch.Tensor:
        """The outputs `[S, K]` of a classifier from those of each member, `[M, S, K]`.

        They say the mean of the probabilities, or of the values where a head has no classes.
        """
        if kind == "single_label":
            return self.combine(scores.softmax(-1)).log().float()
        if kind == "multi_label":  # each class is a question of its own, with two answers
            both = torch.stack([(-scores).sigmoid(), scores.sigmoid()], -1)
            return torch.logit(self.combine(both)[..., 1]).float()
        return self.mean(scores)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The weighted mean `[...]` of `values[M, ...]`."""
        weights = torch.tensor(self.weights or [1.0] * len(values), dtype=values.dtype, device=values.device)
        mean: torch.Tensor = torch.tensordot(weights / weights.sum(), values, 1)
        return mean


AS_IS = Members()
