"""What a run is made of: every technique is switched on where it can be."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmtune.batching.prefetch import BatchPrefetcher
from lmtune.evaluation import scoring
from lmtune.evaluation.evaluate import evaluate_loaded
from lmtune.inference.load import load_for_inference
from lmtune.parallel.single import Single
from lmtune.training import compose, memory
from lmtune.training.estimate import token_cost
from lmtune.training.lifecycle import evaluation_warnings
from tests.workplace import config_of, finetune, inside, make_workplace

SYSTEM = "You work in a shop for garden tools and answer every question of a customer kindly, in one short sentence."


def test_a_run_has_every_technique(tmp_path: Path) -> None:
    folder = make_workplace(tmp_path / "work")
    with inside(folder):
        parts = compose.compose(config_of(data__system=SYSTEM, model__quantization="nf4"), Single())
        job, _ = parts.job()
        with BatchPrefetcher(job.planner, 0, job.data, parts.forward.shares_prefixes) as prefetcher:
            prefetcher.start(1)
            prefetcher.next_step()
            shared = [not batch.segments.is_plain for batch in prefetcher.batches()]
    assert parts.forward.disabled_optimizations == []
    layers = [module for module in parts.forward.base.modules() if hasattr(module, "base_layer")]
    assert layers
    assert all(type(module).__name__.startswith("Fused") for module in layers)
    assert all(module.lmtune_weight.keep for module in layers)  # dequantized once
    assert shared
    assert all(shared)  # the system prompt is packed once
    cost = token_cost(memory.shape_of(parts.forward.model, parts.parameters))
    assert min(cost.before, cost.target) > 0


def test_layers_are_checkpointed_where_memory_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmtune.training.memory import is_checkpointed_throughout

    folder = make_workplace(tmp_path / "work")
    for free, twice in ((2**34, False), (2**16, True)):
        monkeypatch.setattr(compose, "free_memory", lambda *_, free=free: free)
        with inside(folder):
            parts = compose.compose(config_of(), Single())
        assert is_checkpointed_throughout(parts.forward.base) is twice


@pytest.mark.parametrize(
    ("settings", "has_validation", "said"),
    [
        ({}, True, []),
        ({"evaluation__every_steps": 8}, True, []),
        ({"evaluation__every_steps": 9}, True, ["every_steps: 9 is beyond the last step, 8: scored at the end only"]),
        ({"evaluation__every_steps": 2}, False, ["every_steps: 2 has no effect, for no row is held out"]),
    ],
)
def test_settings_of_evaluation_without_effect_are_said(
    settings: dict[str, int], has_validation: bool, said: list[str]
) -> None:
    found = evaluation_warnings(config_of(**settings), has_validation, 8)
    assert len(found) == len(said)
    assert all(part in warning for part, warning in zip(said, found, strict=True))


@pytest.mark.parametrize("every", [None, 2])
def test_no_weights_are_scored_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int | None) -> None:
    """Neither those of the last step nor, where they are kept, those of the best; and the base only where asked."""
    folder, passes, real = make_workplace(tmp_path / "work"), list[str](), compose.score_rows

    def counted(*arguments: Any, **named: Any) -> Any:
        passes.append("validation")
        found = real(*arguments, **named)
        worse = replace(found, scores=replace(found.scores, loss=9.0))
        return found if len(passes) == 1 else worse  # the first is the best

    monkeypatch.setattr(compose, "score_rows", counted)
    monkeypatch.setattr(scoring, "score_rows", lambda *arguments: passes.append("score") or real(*arguments))
    run, summary = finetune(folder, evaluation__every_steps=every, train__max_steps=4, evaluation__score_base=False)
    assert passes == ["validation"] * (1 if every is None else 2)
    assert summary["best_step"] == (4 if every is None else 2)
    assert summary["base"] is None
    assert list(json.loads(run.predictions.read_text().splitlines()[0])) == ["question", "reference", "tuned"]
    with inside(folder):
        scored = evaluate_loaded(load_for_inference(str(run.path)), ["validation.jsonl"], 0, 1, 128).tuned
    for key in ("loss", "token_accuracy", "sequence_accuracy"):
        assert summary["tuned"][key] == pytest.approx(getattr(scored, key), abs=1e-5)
