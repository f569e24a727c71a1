"""Preferences: each objective is its formula, however the step is cut, and inherits all that a step gives.

The plain twins here run each sequence alone, and write the formulas down as their papers do.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lmtune.batching.plan import Planner
from lmtune.batching.prefetch import pack_units
from lmtune.batching.prefixes import shareable_prefix
from lmtune.config.schema import TrainConfig
from lmtune.data.types import TokenizedExample
from lmtune.evaluation.scoring import score_objective, sequence_logprobs
from lmtune.forward.packed import PackedForward
from lmtune.models.tuning.base import TunedModel
from lmtune.objectives.preference import WithOtherAnswers
from lmtune.parallel.single import Single
from lmtune.runs.store import checkpoint_folders
from lmtune.training.checkpoint import load_checkpoint
from lmtune.training.step import step_gradients
from tests.jobs import final_weights, job_for
from tests.processes import lmtune as command
from tests.tiny import Rows, adapted, tiny_model, token_sequence
from tests.workplace import make_workplace, write_config, write_rows

OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"kind": "dpo", "beta": 0.5},
    "dpo-smooth": {"kind": "dpo", "beta": 0.3, "label_smoothing": 0.2, "sft_weight": 0.7},
    "ipo": {"kind": "ipo", "beta": 0.4},
    "orpo": {"kind": "orpo", "beta": 0.6},
    "simpo": {"kind": "simpo", "beta": 2.5, "gamma": 0.8},
    "kto": {"kind": "kto", "beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.7},
}
each = pytest.mark.parametrize("name", OBJECTIVES)
Logprob = Callable[[Any], torch.Tensor]


def rows_for(name: str, count: int = 7, weights: bool = False) -> Rows:
    """Prompts of 20 tokens with two answers, or with one that is judged."""
    generator, rows = np.random.default_rng(0), []
    for index in range(count):
        prompt = generator.integers(3, 128, 20)
        answers = [generator.integers(3, 128, 3 + (index + which) % 5) for which in (0, 1)]
        sequences = [token_sequence([*prompt, *answer], [0] * 20 + [1] * len(answer)) for answer in answers]
        label, weight = bool(index % 3) if name == "kto" else None, 1.0 + index % 3 if weights else 1.0
        own = tuple(sequences[: 1 if name == "kto" else 2])
        rows.append(TokenizedExample(f"rows.jsonl:{index + 1}", own, {}, label, weight))
    made = Rows(rows)
    if weights:
        table = made.sequences
        of_rows = np.array([row.weight for row in rows])
        made.sequences = type(table)(table.num_tokens, table.num_targets, table.first, of_rows)
    return made


def logprob_under(model: Any) -> Logprob:
    """The log-probability of a sequence's targets, of a forward pass of its own."""

    def logprob(sequence: Any) -> torch.Tensor:
        ids, mask = torch.tensor(sequence.input_ids, dtype=torch.long), torch.tensor(sequence.loss_mask)
        each = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        return each[mask[1:]].sum()

    return logprob


def by_formula(settings: dict[str, Any], examples: list[tuple[Any, Any, Any, float, Any]]) -> torch.Tensor:
    """The loss of a step over examples: log-probabilities, reference and lengths of two answers, weight, label."""
    kind, beta, log, losses = settings["kind"], settings["beta"], torch.log, []
    z = max(0.0, torch.stack([policy[1] - reference[1] for policy, reference, *_ in examples]).mean().item())
    for (chosen, rejected), (reference_c, reference_r), (n_c, n_r), weight, label in examples:
        ratio_c, ratio_r = chosen - reference_c, rejected - reference_r
        if kind == "dpo":
            s, m = settings.get("label_smoothing", 0.0), beta * (ratio_c - ratio_r)
            loss = -(1 - s) * log(torch.sigmoid(m)) - s * log(torch.sigmoid(-m))
            loss = loss - settings.get("sft_weight", 0.0) * chosen / n_c
        elif kind == "ipo":
            loss = (ratio_c / n_c - ratio_r / n_r - 1 / (2 * beta)) ** 2
        elif kind == "orpo":
            p_c, p_r = torch.exp(chosen / n_c), torch.exp(rejected / n_r)
            loss = -chosen / n_c - beta * log(torch.sigmoid(log(p_c / (1 - p_c)) - log(p_r / (1 - p_r))))
        elif kind == "simpo":
            loss = -log(torch.sigmoid(beta * (chosen / n_c - rejected / n_r) - settings["gamma"]))
        elif label:
            loss = settings["desirable_weight"] * (1 - torch.sigmoid(beta * (ratio_c - z)))
        else:
            loss = settings["undesirable_weight"] * (1 - torch.sigmoid(beta * (z - ratio_c)))
        losses.append(weight * loss)
    return torch.stack(losses).sum() / sum(example[3] for example in examples)


def plain_step(settings: dict[str, Any], model: TunedModel, rows: Rows) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of all rows in one step, by plain PyTorch."""
    store = WithOtherAnswers(rows) if settings["kind"] == "kto" else rows
    logprob, examples = logprob_under(model.base), []
    for row in (store[index] for index in range(len(rows))):
        with torch.no_grad(), model.without_adapter():
            reference = [logprob(sequence) for sequence in row.sequences]
        lengths = [sequence.num_targets for sequence in row.sequences]
        policy = [logprob(sequence) for sequence in row.sequences]
        examples.append((policy, reference, lengths, row.weight, row.label))
    model.module.zero_grad()
    loss = by_formula(settings, examples)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.trainable().items()}


@each
@pytest.mark.parametrize("budget", [1, 80, 10**6])
def test_a_step_is_the_formula_however_it_is_cut(name: str, budget: int, tmp_path: Path) -> None:
    """From an adapter that is not the start; the reference is the model without it."""
    rows = rows_for(name, weights=True)
    job = job_for(tmp_path, model=adapted(tiny_model()).eval(), objective=OBJECTIVES[name], rows=rows)
    model, objective, forward = job.parts.model, job.parts.objective, job.forward
    loss, gradients = plain_step(OBJECTIVES[name], model, rows)
    with model.without_adapter():
        job.parts.precompute()
    store = job.parts.rows
    planner = Planner(
        store.sequences, TrainConfig(batch_size=7, epochs=1), 1, budget,
        lambda row: [shareable_prefix(one.input_ids, one.loss_mask) for one in store[row].sequences],
        units_of=objective.units,
    )  # fmt: skip
    plan = planner.step(1)
    batches = [pack_units(store, units, 7, forward.shares_prefixes) for units in plan.micro_batches[0]]
    assert all(batch.input_ids.shape[1] == batch.num_tokens - 20 * (len(batch.example_of) // 2) for batch in batches)
    assert len(batches) == {1: 7, 80: 4, 10**6: 1}[budget]
    result = step_gradients(forward, objective, model.trainable(), batches, plan.totals, Single())
    assert result.loss == pytest.approx(loss, abs=1e-5)
    for key, parameter in model.trainable().items():
        torch.testing.assert_close(parameter.grad, gradients[key], atol=1e-5, rtol=1e-4)
    scored = score_objective(forward, objective, store, 60)
    assert scored.loss == pytest.approx(loss, abs=1e-5)
    assert scored.sequence_accuracy == result.num_correct / 7
    assert scored.metrics == pytest.approx(result.metrics, abs=1e-4)


@each
def test_micro_batches_of_any_size_give_the_same_weights(tmp_path: Path, name: str) -> None:
    def weights(folder: str, **settings: Any) -> dict[str, torch.Tensor]:
        rows = rows_for(name, 12)
        return final_weights(
            job_for(tmp_path / folder, objective=OBJECTIVES[name], rows=rows, train__learning_rate=1e-3, **settings)
        )

    whole = weights("whole")
    for budget in (1, 70):
        for key, weight in weights(f"cut{budget}", train__micro_batch_tokens=budget).items():
            torch.testing.assert_close(weight, whole[key], atol=2e-5, rtol=0)


@each
def test_resuming_from_any_step_is_bitwise_the_same(tmp_path: Path, name: str) -> None:
    settings: dict[str, Any] = {
        "run__checkpoint_every_steps": 1, "run__keep_checkpoints": 10, "objective": OBJECTIVES[name],
        "rows": rows_for(name, 12), "dropout": 0.1,
    }  # fmt: skip
    whole = final_weights(job_for(tmp_path / "whole", **settings))
    for path in checkpoint_folders(tmp_path / "whole" / "checkpoints")[:-1]:
        resumed = load_checkpoint(path)
        again = final_weights(job_for(tmp_path / f"from{resumed.step}", resumed=resumed, **settings))
        assert all(torch.equal(again[key], weight) for key, weight in whole.items()), path.name


def test_reference_log_probabilities_are_those_of_sequences_alone() -> None:
    model, rows = TunedModel(adapted(tiny_model()).eval()), rows_for("dpo")
    found = sequence_logprobs(PackedForward(model.module), lambda count: [(0, 1)], rows)
    with torch.no_grad():
        wanted = [float(logprob_under(model.base)(one)) for row in rows.rows for one in row.sequences]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_judged_row_has_the_answer_of_the_row_before_beside_its_own() -> None:
    rows = rows_for("kto")
    both = WithOtherAnswers(rows)
    for index in range(len(rows)):
        own, other = both[index].sequences
        (before,) = rows[(index - 1) % len(rows)].sequences
        assert own == rows[index].sequences[0]
        assert other.input_ids[:20].tolist() == own.input_ids[:20].tolist()
        answer = before.input_ids[before.loss_mask].tolist()
        assert other.input_ids[other.loss_mask].tolist() == answer[: other.num_targets]
        assert len(other) <= rows.sequences.longest
        tokens, targets = (
            part[2 * index :][:2].tolist() for part in (both.sequences.num_tokens, both.sequences.num_targets)
        )
        assert tokens == [len(own), len(other)]
        assert targets == [own.num_targets, other.num_targets]


@pytest.mark.parametrize("name", ["dpo", "ipo", "orpo", "simpo"])
def test_learning_makes_the_chosen_answers_worth_more(tmp_path: Path, name: str) -> None:
    job = job_for(tmp_path / name, objective=OBJECTIVES[name], rows=rows_for(name, 12), train__epochs=8)
    job.parts.precompute()
    before, _, after = (
        score_objective(job.forward, job.parts.objective, job.parts.rows, 10**6) if when != 1 else final_weights(job)
        for when in range(3)
    )
    assert after.loss < before.loss
    assert after.metrics["reward_accuracy"] == 1.0
    assert after.metrics["pair_accuracy"] >= before.metrics["pair_accuracy"]


def test_a_section_of_the_config_says_which_rows_its_objective_is_over() -> None:
    """`check` needs it before torch is imported, the objective states it for whoever reads it."""
    from lmtune.models.head import Head
    from lmtune.objectives.chosen import _OBJECTIVES

    head = Head("single_label", ("no", "yes"))
    assert all(section().rows == make(section(), head).rows for section, make in _OBJECTIVES.items())


def test_odds_of_sure_answers_stay_finite() -> None:
    from lmtune.objectives.preference import _log1mexp

    x = torch.tensor([-1e-6, -1e-3, -1.0, -50.0])
    wanted = [math.log(-math.expm1(float(value))) for value in x]
    torch.testing.assert_close(_log1mexp(x), torch.tensor(wanted), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "name", ["dpo", *(pytest.param(name, marks=pytest.mark.long) for name in ("kto", "ipo", "orpo", "simpo"))]
)
def test_two_processes_give_what_one_gives(tmp_path: Path, name: str) -> None:
    place = make_workplace(tmp_path / "work")
    rows = [
        {"prompt": f"Say number {n}!", "chosen": f"It is {n}.", "rejected": f"No. {9 - n % 10}"} if name != "kto"
        else {"prompt": f"Say number {n}!", "completion": f"It is {n}." if n % 3 else "No.", "label": bool(n % 3)}
        for n in range(20)
    ]  # fmt: skip
    for file, some in (("train", rows[:-5]), ("validation", rows[-5:])):
        write_rows(place / f"{file}.jsonl", some)
    write_config(place, objective__kind=name, train__learning_rate=1e-3)
    assert command(place, "finetune", "run.yaml", "run.name=one") == 0
    assert command(place, "finetune", "run.yaml", "run.name=two", "--processes", "2") == 0
    one, two = (load_file(place / "runs" / run / "adapter" / "adapter_model.safetensors") for run in ("one", "two"))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=1e-5, rtol=0)
    scores = [json.loads((place / "runs" / run / "summary.json").read_text())["tuned"] for run in ("one", "two")]
    assert scores[1] == pytest.approx(scores[0], abs=1e-4)
