"""Preferences: of two answers to one prompt the better one becomes more likely, or of judged answers the good ones.

    dpo     -log sigmoid(beta m), m = log-ratio of the chosen answer less that of the rejected one
    ipo     (m - 1 / (2 beta))², both log-ratios divided by their answer's length
    orpo    -log p of a chosen token - beta log sigmoid(log odds ratio), without a reference
    simpo   -log sigmoid(beta (mean log p chosen - mean log p rejected) - gamma), without a reference
    kto     weight (1 - sigmoid(±beta (log-ratio - z))) of each judged answer, z the divergence from the reference

A log-ratio is the log-probability of an answer less that under the reference: the model as it is before the first
step, whose log-probabilities are computed once and stored beside the tokens. The sum of an objective is over its pairs
or rows, its denominator their number, by weight. A pair shares a micro-batch, and so its prompt.

DPO: https://arxiv.org/abs/2305.18290, with the likelihood term of RPO: https://arxiv.org/abs/2404.19733; IPO:
https://arxiv.org/abs/2310.12036; ORPO: https://arxiv.org/abs/2403.07691; SimPO: https://arxiv.org/abs/2405.14734; KTO:
https://arxiv.org/abs/2402.01306.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from lmtune.batching.packing import MicroBatch
from lmtune.config.schema import DpoConfig, IpoConfig, KtoConfig, OrpoConfig, SimpoConfig
from lmtune.data.sequences import SequenceTable
from lmtune.data.types import ExampleStore, RowKind, TokenizedExample, TokenSequence, WithValues
from lmtune.forward.packed import Outputs
from lmtune.objectives.base import LossSum, ObjectiveDefaults, SequenceLogprobs, sum_of_rows

Settings = TypeVar("Settings")
PAIR: Sequence[Sequence[int]] = ((0, 1),)


@dataclass(frozen=True)
class Answers:
    """The two sequences of each of P examples, `[P]` fp32 each.

    Attributes:
        logprobs: of the first and of the second, summed over the answer's tokens; with a gradient.
        lengths: tokens of the answers.
        reference: their log-probabilities under the reference; zeros without one.
        weights: of the examples.
        example: their numbers in the step, int64.
    """

    logprobs: tuple[torch.Tensor, torch.Tensor]
    lengths: tuple[torch.Tensor, torch.Tensor]
    reference: tuple[torch.Tensor, torch.Tensor]
    weights: torch.Tensor
    example: torch.Tensor

    @classmethod
    def of(cls, outputs: Outputs, batch: MicroBatch) -> Answers:
        """What a micro-batch holds: the sequences of an example one after the other."""
        count = len(batch.example_of)
        zeros = torch.zeros(count, device=outputs.logprobs.device)
        sums = zeros.index_add(0, batch.sequence_of, outputs.logprobs)
        lengths = zeros.index_add(0, batch.sequence_of, torch.ones_like(outputs.logprobs))
        reference = batch.values["reference"][::2] if "reference" in batch.values else zeros.view(-1, 2)
        return cls(
            (sums[::2], sums[1::2]), (lengths[::2], lengths[1::2]), (reference[:, 0], reference[:, 1]),
            batch.weights[::2], batch.example_of[::2],
        )  # fmt: skip

    @property
    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The log-probability of a token, on average."""
        return self.logprobs[0] / self.lengths[0], self.logprobs[1] / self.lengths[1]

    @property
    def log_ratios(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The log-probabilities less those under the reference."""
        return self.logprobs[0] - self.reference[0], self.logprobs[1] - self.reference[1]


class _Pairs(ObjectiveDefaults, Generic[Settings]):
    """What the objectives over pairs share; each says what a pair costs, and what its answers are worth."""

    rows: ClassVar[RowKind] = "pair"
    metrics: ClassVar[tuple[str, ...]] = (
        "reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy", "pair_accuracy", "logprob_chosen",
        "logprob_rejected", "length_chosen", "length_rejected",
    )  # fmt: skip
    has_reference: ClassVar[bool] = True

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def units(self, num_sequences: int) -> Sequence[Sequence[int]]:
        """A pair, whose prompt is then computed once."""
        return PAIR

    def precompute(self, store: ExampleStore, logprobs: SequenceLogprobs) -> ExampleStore:
        """The log-probabilities of the answers under the reference."""
        return with_reference(store, logprobs) if self.has_reference else store

    def loss(self, outputs: Outputs, batch: MicroBatch, statistic: float = 0.0) -> LossSum:
        """The losses of the pairs; an error is a pair whose rejected answer is worth as much as the chosen one."""
        answers = Answers.of(outputs, batch)
        losses, (chosen, rejected) = self.of_pairs(answers)
        wrong, likelier = chosen <= rejected, self._likelihood(answers)
        found = (
            chosen, rejected, chosen - rejected, ~wrong, likelier[0] > likelier[1], *answers.logprobs, *answers.lengths,
        )  # fmt: skip
        metrics = dict(zip(self.metrics, found, strict=True))
        return sum_of_rows(losses, answers.weights, wrong, answers.example, batch.num_examples, **metrics)

    @abc.abstractmethod
    def of_pairs(self, answers: Answers) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """The loss of each pair, with a gradient, and the rewards of its answers."""

    def _likelihood(self, answers: Answers) -> tuple[torch.Tensor, torch.Tensor]:
        """By what one answer is likelier than the other: the whole of it, or a token on average."""
        return answers.logprobs


class Dpo(_Pairs[DpoConfig]):
    """Direct preference optimization, with a likelihood term if asked."""

    kind: ClassVar[str] = "dpo"

    def of_pairs(self, answers: Answers) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """See `_Pairs`."""
        beta, smoothing = self.settings.beta, self.settings.label_smoothing
        chosen, rejected = answers.log_ratios
        margin = beta * (chosen - rejected)
        losses = -F.logsigmoid(margin) * (1 - smoothing) - F.logsigmoid(-margin) * smoothing
        if self.settings.sft_weight:
            losses = losses - self.settings.sft_weight * answers.means[0]
        return losses, (beta * chosen.detach(), beta * rejected.detach())


class Ipo(_Pairs[IpoConfig]):
    """Identity preference optimization, over log-ratios of a token on average, as its authors compute it."""

    kind: ClassVar[str] = "ipo"

    def of_pairs(self, answers: Answers) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """See `_Pairs`."""
        beta = self.settings.beta
        chosen, rejected = (ratio / n for ratio, n in zip(answers.log_ratios, answers.lengths, strict=True))
        return (chosen - rejected - 1 / (2 * beta)) ** 2, (beta * chosen.detach(), beta * rejected.detach())


class Orpo(_Pairs[OrpoConfig]):
    """Odds ratio preference optimization: the likelihood of the chosen answer, and its odds to the rejected one."""

    kind: ClassVar[str] = "orpo"
    has_reference: ClassVar[bool] = False

    def of_pairs(self, answers: Answers) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """See `_Pairs`."""
        beta, (chosen, rejected) = self.settings.beta, answers.means
        log_odds = chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))
        return -chosen - beta * F.logsigmoid(log_odds), (beta * chosen.detach(), beta * rejected.detach())

    def _likelihood(self, answers: Answers) -> tuple[torch.Tensor, torch.Tensor]:
        return answers.means


class Simpo(_Pairs[SimpoConfig]):
    """Simple preference optimization: mean log-probabilities, a margin, no reference."""

    kind: ClassVar[str] = "simpo"
    has_reference: ClassVar[bool] = False

    def of_pairs(self, answers: Answers) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """See `_Pairs`."""
        beta, (chosen, rejected) = self.settings.beta, answers.means
        losses = -F.logsigmoid(beta * (chosen - rejected) - self.settings.gamma)
        return losses, (beta * chosen.detach(), beta * rejected.detach())

    def _likelihood(self, answers: Answers) -> tuple[torch.Tensor, torch.Tensor]:
        return answers.means


class Kto(ObjectiveDefaults):
    """Kahneman-Tversky optimization: judged answers, each by itself.

    The divergence z is estimated as in the paper: the mean log-ratio of answers to other prompts, and not below 0. It
    is of the whole step, so that it does not depend on how the step is cut; the answers are those of the row before.
    """

    kind: ClassVar[str] = "kto"
    rows: ClassVar[RowKind] = "judged"
    two_passes: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = (
        "reward_desirable", "reward_undesirable", "accuracy", "kl", "logprob_desirable", "logprob_undesirable",
    )  # fmt: skip

    def __init__(self, settings: KtoConfig) -> None:
        self.settings = settings

    def units(self, num_sequences: int) -> Sequence[Sequence[int]]:
        """A row's own answer and the other one, whose prompt is computed once."""
        return PAIR

    def precompute(self, store: ExampleStore, logprobs: SequenceLogprobs) -> ExampleStore:
        """Each row with another row's answer beside its own, their reference log-probabilities, and the judgement."""
        both = WithOtherAnswers(store)
        judged = np.array([float(bool(store[row].label)) for row in range(len(store))], dtype=np.float32)
        return WithValues(with_reference(both, logprobs), desirable=judged)

    def statistic(self, outputs: Outputs, batch: MicroBatch) -> tuple[torch.Tensor, int]:
        """The sum and number of the log-ratios of the other answers."""
        other = Answers.of(outputs, batch).log_ratios[1]
        return other.sum(), len(other)

    def loss(self, outputs: Outputs, batch: MicroBatch, statistic: float = 0.0) -> LossSum:
        """The losses of the rows; an error is one on the wrong side of z, which `statistic` is the estimate of."""
        answers, z = Answers.of(outputs, batch), max(statistic, 0.0)
        good = batch.values["desirable"][::2] > 0
        ratio = answers.log_ratios[0]
        weight = torch.where(good, self.settings.desirable_weight, self.settings.undesirable_weight)
        losses = weight * (1 - torch.sigmoid(self.settings.beta * torch.where(good, ratio - z, z - ratio)))
        wrong = torch.where(good, ratio <= z, ratio >= z)
        result = sum_of_rows(
            losses, answers.weights, wrong, answers.example, batch.num_examples, accuracy=~wrong,
            kl=torch.full_like(losses, z),
        )  # fmt: skip
        rewards, logprobs = self.settings.beta * ratio.detach(), answers.logprobs[0].detach()
        parts = {
            f"{name}_{side}": (values * mask, mask.float())
            for name, values in (("reward", rewards), ("logprob", logprobs))
            for side, mask in (("desirable", good), ("undesirable", ~good))
        }
        of_sides = {name: (values.sum(), mask.sum()) for name, (values, mask) in parts.items()}
        return replace(result, metrics={**result.metrics, **of_sides}, parts={**result.parts, **parts})


class WithOtherAnswers:
    """Judged rows, each with a second sequence: its prompt and the answer of the row before, cut to the longest row."""

    def __init__(self, store: ExampleStore) -> None:
        self._store = store
        table = store.sequences
        prompts = table.num_tokens - table.num_targets
        answers = np.minimum(np.roll(table.num_targets, 1), np.maximum(1, table.longest - prompts)).astype(np.int32)
        self._answers = answers
        tokens = np.stack([table.num_tokens, prompts + answers], 1).ravel()
        targets = np.stack([table.num_targets, answers], 1).ravel()
        self.sequences = SequenceTable(tokens, targets, np.arange(0, 2 * len(store) + 1, 2), table.weights)
        self.signature = store.signature

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: int) -> TokenizedExample:
        row, before = self._store[index], self._store[(index - 1) % len(self)]
        (own,), (other,) = row.sequences, before.sequences
        prompt, answer = own.input_ids[~own.loss_mask], other.input_ids[other.loss_mask][: self._answers[index]]
        mask = np.arange(len(prompt) + len(answer)) >= len(prompt)
        mismatched = TokenSequence(np.concatenate([prompt, answer]), mask)
        return TokenizedExample(row.location, (own, mismatched), row.values, row.label, row.weight)

    def location(self, index: int) -> str:
        """`file:line` of a row."""
        return self._store.location(index)


def with_reference(store: ExampleStore, logprobs: SequenceLogprobs) -> ExampleStore:
    """`store`, of two sequences a row, with `reference` `[N, 2]`: their log-probabilities under the model as it is."""
    return WithValues(store, reference=logprobs(store).reshape(-1, 2).astype(np.float32))


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """`log(1 - e^x)` of x below 0."""
    return torch.log(-torch.expm1(x))
