"""Classification, regression and reward: each is its formula over rows that run alone, however the step is cut.

The plain twin is transformers' own classifier, a row at a time.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmtune.batching.plan import Planner
from lmtune.batching.prefetch import pack_units
from lmtune.batching.prefixes import shareable_prefix
from lmtune.config.schema import TrainConfig
from lmtune.data.types import TokenizedExample
from lmtune.evaluation.scoring import score_objective
from lmtune.forward.packed import PackedForward
from lmtune.models.head import Head
from lmtune.models.tuning.base import TunedModel
from lmtune.objectives.classification import balancing
from lmtune.parallel.single import Single
from lmtune.runs.store import checkpoint_folders
from lmtune.training.checkpoint import load_checkpoint
from lmtune.training.step import step_gradients
from tests.jobs import final_weights, job_for
from tests.tiny import Rows, adapted, pack_rows, tiny_classifier, token_sequence

CLASSES = ("blue", "green", "red")
CASES: dict[str, tuple[dict[str, Any], Head]] = {
    "single": ({"kind": "classification"}, Head("single_label", CLASSES)),
    "balanced": ({"kind": "classification", "class_weights": "balanced"}, Head("single_label", CLASSES)),
    "multi": ({"kind": "classification"}, Head("multi_label", CLASSES)),
    "multi-balanced": ({"kind": "classification", "class_weights": "balanced"}, Head("multi_label", CLASSES)),
    "regression": ({"kind": "regression"}, Head("value", ("value",))),
    "reward": ({"kind": "reward"}, Head("reward", ("reward",))),
}  # fmt: skip
each = pytest.mark.parametrize("name", CASES)
OF_ROWS = [(0,), (2,), (1, 2), (0,), (), (0, 1), (2,)]  # classes, where a row may have several


def rows_for(name: str, weights: bool = True) -> Rows:
    """Seven rows, or pairs, that begin with the same 20 tokens."""
    generator, rows = np.random.default_rng(0), []
    beginning = generator.integers(3, 128, 20)
    for index, classes in enumerate(OF_ROWS):
        ends = [generator.integers(3, 128, 3 + (index + which) % 5) for which in (0, 1)]
        mask = [0] * 20 + [1] * 9 if name == "reward" else [0] * 29
        sequences = tuple(token_sequence([*beginning, *end], mask[: 20 + len(end)]) for end in ends)
        label: Any = tuple(CLASSES[place] for place in classes)
        if "multi" not in name:
            label = None if name == "reward" else 0.3 * index - 1 if name == "regression" else CLASSES[index % 4 // 2]
        own = sequences if name == "reward" else sequences[:1]
        rows.append(TokenizedExample(f"rows.jsonl:{index + 1}", own, {}, label, 1.0 + index % 3 if weights else 1.0))
    return Rows(rows)


def by_formula(name: str, model: Any, rows: Rows) -> torch.Tensor:
    """The loss of all rows in one step, each read by a forward pass of its own."""
    total = sum(row.weight for row in rows.rows)
    present, losses = len({row.label for row in rows.rows}), []

    def scores(sequence: Any) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=torch.tensor(sequence.input_ids[None], dtype=torch.long)).logits[0]
        return found

    def balance(is_like: Any) -> float:
        return total / sum(row.weight for row in rows.rows if is_like(row.label))

    def binary(label: Any, place: int, score: torch.Tensor) -> torch.Tensor:
        one = CLASSES[place]
        has, p = one in label, torch.sigmoid(score)
        weight = balance(lambda other: (one in other) == has) / 2 if "balanced" in name else 1
        return -weight * torch.log(p if has else 1 - p)

    for row in rows.rows:
        given, label = [scores(sequence) for sequence in row.sequences], row.label
        if name == "reward":
            loss = -torch.log(torch.sigmoid(given[0][0] - given[1][0]))
        elif name == "regression":
            loss = (given[0][0] - label) ** 2
        elif "multi" in name:
            loss = torch.stack([binary(label, place, given[0][place]) for place in range(3)]).mean()
        else:
            weight = balance(lambda other, own=label: other == own) / present if "balanced" in name else 1
            loss = -weight * given[0].log_softmax(-1)[CLASSES.index(label)]
        losses.append(row.weight * loss)
    return torch.stack(losses).sum() / total


@each
@pytest.mark.parametrize("budget", [1, 60, 10**6])
def test_a_step_is_the_formula_however_it_is_cut(name: str, budget: int, tmp_path: Path) -> None:
    """From an adapter that is not the start, and with a head beside it."""
    settings, head = CASES[name]
    rows, model = rows_for(name), TunedModel(adapted(tiny_classifier(head)).eval())
    assert any("score" in key for key in model.trainable())
    job = job_for(tmp_path, model=model.module, objective=settings, rows=rows, head=head)
    loss = by_formula(name, model.module, rows)
    model.module.zero_grad()
    loss.backward()
    gradients = {key: parameter.grad.clone() for key, parameter in model.trainable().items()}
    objective, forward = job.parts.objective, job.forward
    job.parts.precompute()
    store = job.parts.rows
    planner = Planner(
        store.sequences, TrainConfig(batch_size=7, epochs=1), 1, budget,
        lambda row: [shareable_prefix(one.input_ids, one.loss_mask) for one in store[row].sequences],
        units_of=objective.units,
    )  # fmt: skip
    plan = planner.step(1)
    batches = [pack_units(store, units, 7, forward.shares_prefixes, objective.reads) for units in plan.micro_batches[0]]
    assert (len(batches) > 1) is (budget < 10**6)
    result = step_gradients(forward, objective, model.trainable(), batches, plan.totals, Single())
    assert result.loss == pytest.approx(loss.item(), abs=1e-5)
    for key, parameter in model.trainable().items():
        torch.testing.assert_close(parameter.grad, gradients[key], atol=1e-5, rtol=1e-4)
    scored = score_objective(forward, objective, store, 60)
    assert scored.loss == pytest.approx(loss.item(), abs=1e-5)
    assert scored.sequence_accuracy == result.num_correct / 7
    assert {key: scored.metrics[key] for key in result.metrics} == pytest.approx(dict(result.metrics), abs=1e-5)


@pytest.mark.parametrize("name", ["single", "multi", "regression"])
def test_the_loss_is_that_of_transformers(name: str) -> None:
    head, rows = CASES[name][1], rows_for(name, weights=False)
    model, losses = tiny_classifier(head), []
    for row in rows.rows:
        number: Any = row.label
        if name != "regression":
            number = CLASSES.index(number) if name == "single" else [float(one in number) for one in CLASSES]
        ids = torch.tensor(row.sequences[0].input_ids[None], dtype=torch.long)
        losses.append(model(input_ids=ids, labels=torch.tensor([number])).loss)
    torch.testing.assert_close(torch.stack(losses).mean(), by_formula(name, model, rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("share", [False, True])
def test_packed_scores_are_those_of_transformers(kind: str, share: bool) -> None:
    model = tiny_classifier(Head("single_label", CLASSES), kind)
    forward, rows = PackedForward(model), rows_for("single").rows
    assert forward.shares_prefixes
    batch = pack_rows(rows, share, reads=forward.reads)
    assert (batch.input_ids.shape[1] < batch.num_tokens) is share
    with torch.no_grad(), forward.context():
        found = forward(batch).scores
    assert found is not None
    for row, scores in zip(rows, found, strict=True):
        ids = torch.tensor(row.sequences[0].input_ids[None], dtype=torch.long)
        torch.testing.assert_close(scores, model(input_ids=ids).logits[0], atol=1e-5, rtol=1e-5)


def test_a_model_that_cannot_pack_gives_the_same() -> None:
    forward = PackedForward(tiny_classifier(Head("single_label", CLASSES)))
    batch = pack_rows(rows_for("single").rows, reads="last_token")
    with torch.no_grad(), forward.context():
        packed = forward(batch).scores
    forward.capabilities = replace(forward.capabilities, packing="not here", label_only_layer="not here")
    with torch.no_grad(), forward.context():
        torch.testing.assert_close(forward(batch).scores, packed, atol=1e-5, rtol=1e-5)


@each
def test_micro_batches_change_nothing_and_resuming_is_bitwise(name: str, tmp_path: Path) -> None:
    settings, head = CASES[name]
    # AdamW moves a weight by about the learning rate in a step, also one whose gradient is all rounding
    common: dict[str, Any] = {
        "objective": settings, "head": head, "train__learning_rate": 1e-4, "run__checkpoint_every_steps": 1,
        "run__keep_checkpoints": 9,
    }  # fmt: skip

    def run(folder: str, **more: Any) -> dict[str, torch.Tensor]:
        model = TunedModel(adapted(tiny_classifier(head)))
        return final_weights(job_for(tmp_path / folder, model=model.module, rows=rows_for(name), **common, **more))

    whole = run("whole")
    for budget in (1, 60):
        cut = run(f"cut{budget}", train__micro_batch_tokens=budget)
        for key, weight in whole.items():
            torch.testing.assert_close(cut[key], weight, atol=1e-5, rtol=0)
    for path in checkpoint_folders(tmp_path / "whole" / "checkpoints")[:-1]:
        again = run(f"from{path.name}", resumed=load_checkpoint(path))
        assert all(torch.equal(again[key], weight) for key, weight in whole.items()), path.name


def test_balanced_classes_have_the_same_share_whatever_their_number() -> None:
    target, weights = np.array([0, 0, 0, 0, 0, 1, 2, 2], dtype=np.float32), np.array([1.0, 1, 1, 1, 1, 2, 1, 1])
    balanced = balancing(target, 3, weights) * weights
    assert [balanced[target == one].sum() for one in range(3)] == pytest.approx([3, 3, 3])
    several = np.array([[1, 0], [1, 1], [1, 0], [0, 0]], dtype=np.float32)
    both = balancing(several, 2, np.ones(4))
    for place in range(2):
        assert [both[several[:, place] == has, place].sum() for has in (0, 1)] == pytest.approx([2, 2])
