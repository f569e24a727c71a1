"""The seam of objectives holds for more than SFT: preferences (DPO) in forty lines, with all that the step gives.

Pairs stay together and share their prompt, the reference is computed once and stored beside the tokens, and the
gradient is that of a plain loop, however the step is cut: https://arxiv.org/abs/2305.18290.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lmtune.batching.packing import MicroBatch
from lmtune.batching.plan import Planner, Totals, Unit
from lmtune.batching.prefetch import pack_units
from lmtune.batching.prefixes import shareable_prefix
from lmtune.config.schema import TrainConfig
from lmtune.data.types import ExampleStore, RowKind, TokenizedExample, WithValues
from lmtune.forward.packed import Outputs, PackedForward
from lmtune.models.tuning.base import TunedModel
from lmtune.objectives.base import LossSum
from lmtune.parallel.single import Single
from lmtune.training.step import step_gradients
from tests.tiny import Rows, adapted, tiny_model, token_sequence

BETA = 0.5


class Dpo:
    """`-log sigmoid(beta * (chosen - rejected))`, each the summed log-probability less that of the reference."""

    kind: ClassVar[str] = "dpo"
    rows: ClassVar[RowKind] = "pair"
    metrics: ClassVar[tuple[str, ...]] = ("margin",)
    selection: ClassVar[tuple[str, Literal["min", "max"]]] = ("loss", "min")

    def units(self, num_sequences: int) -> Sequence[Sequence[int]]:
        return [(0, 1)]

    def denominator(self, totals: Totals) -> float:
        return totals.examples

    def precompute(self, model: TunedModel, forward: PackedForward, store: ExampleStore) -> ExampleStore:
        pairs = [pack_units(store, [Unit(0, row, (0, 1))], 1, forward.shares_prefixes) for row in range(len(store))]
        with torch.no_grad(), model.without_adapter(), forward.context():
            margins = np.array([float(margin_of(forward(pair), pair)) for pair in pairs], dtype=np.float32)
        return WithValues(store, reference=margins)

    def loss(self, outputs: Outputs, batch: MicroBatch) -> LossSum:
        margins = BETA * (margin_of(outputs, batch) - batch.values["reference"][::2])  # [pairs]
        errors = torch.zeros(batch.num_examples).index_add_(0, batch.example_of[::2], (margins <= 0).float())
        count = torch.tensor(float(len(margins)))
        return LossSum(-F.logsigmoid(margins).sum(), errors, {"margin": (margins.detach().sum(), count)})


def margin_of(outputs: Outputs, batch: MicroBatch) -> torch.Tensor:
    """`[pairs]`: log-probability of the chosen answer less that of the rejected one."""
    sums = torch.zeros(len(batch.example_of)).index_add(0, batch.sequence_of, outputs.logprobs)
    return sums[::2] - sums[1::2]


def pairs(count: int) -> Rows:
    """A prompt of 20 tokens with two answers, each."""
    generator, rows = np.random.default_rng(0), []
    for index in range(count):
        prompt = generator.integers(3, 128, 20)
        answers = [generator.integers(3, 128, 3 + (index + which) % 5) for which in (0, 1)]
        sequences = [token_sequence([*prompt, *answer], [0] * 20 + [1] * len(answer)) for answer in answers]
        rows.append(TokenizedExample(f"pairs.jsonl:{index + 1}", sequences))
    return Rows(rows)


def by_hand(model: TunedModel, rows: Rows) -> tuple[float, dict[str, torch.Tensor], float]:
    """Loss, gradients and mean margin of all pairs in plain PyTorch."""

    def logprob(ids: np.ndarray, mask: np.ndarray) -> torch.Tensor:
        tokens = torch.tensor(ids, dtype=torch.long)
        each = model.base(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        return each[torch.tensor(mask[1:])].sum()

    total, margins = 0.0, []
    model.module.zero_grad()
    for row in rows.rows:
        parts = [(sequence.input_ids, sequence.loss_mask) for sequence in row.sequences]
        with torch.no_grad(), model.without_adapter():
            reference = logprob(*parts[0]) - logprob(*parts[1])
        margin = BETA * (logprob(*parts[0]) - logprob(*parts[1]) - reference)
        loss = -F.logsigmoid(margin) / len(rows)
        loss.backward()
        total += loss.item()
        margins.append(margin.item())
    return total, {name: p.grad.clone() for name, p in model.trainable().items()}, float(np.mean(margins))


@pytest.mark.parametrize("budget", [1, 60, 10**6])
def test_preferences_inherit_packing_shared_prefixes_and_the_layout_that_changes_nothing(budget: int) -> None:
    model, rows, objective = TunedModel(adapted(tiny_model()).eval()), pairs(7), Dpo()
    loss, gradients, margin = by_hand(model, rows)
    forward = PackedForward(model.module)
    store = objective.precompute(model, forward, rows)
    planner = Planner(
        store.sequences, TrainConfig(batch_size=7, epochs=1), 1, budget,
        lambda row: [shareable_prefix(one.input_ids, one.loss_mask) for one in rows[row].sequences],
        units_of=objective.units,
    )  # fmt: skip
    plan = planner.step(1)
    batches = [pack_units(store, units, 7, forward.shares_prefixes) for units in plan.micro_batches[0]]
    assert all(batch.input_ids.shape[1] == batch.num_tokens - 20 * (len(batch.example_of) // 2) for batch in batches)
    assert len(batches) == {1: 7, 60: 4, 10**6: 1}[budget]
    assert plan.longest == max(len(a.input_ids) + len(b.input_ids) - 20 for a, b in (r.sequences for r in rows.rows))
    result = step_gradients(forward, objective, model.trainable(), batches, plan.totals, Single())
    assert result.loss == pytest.approx(loss, abs=1e-5)
    assert result.metrics["margin"] == pytest.approx(margin, abs=1e-5)
    for name, parameter in model.trainable().items():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)


def test_a_section_of_the_config_says_which_rows_its_objective_is_over() -> None:
    """`check` needs it before torch is imported, the objective states it for whoever reads it."""
    from lmtune.training.compose import OBJECTIVES

    assert all(section().rows == objective.rows for section, objective in OBJECTIVES.items())  # type: ignore[attr-defined]
