"""The best step and the end of a run by any metric of the validation rows."""

from pathlib import Path
from typing import Any

import pytest

from lmtune.config.metrics import METRICS, direction_of
from lmtune.config.schema import FinetuneConfig
from lmtune.errors import ConfigError, LmtuneError
from lmtune.evaluation.scoring import Scores
from lmtune.models.head import Head
from lmtune.objectives import chosen
from lmtune.training.hooks import EarlyStoppingHook, EvaluationHook
from lmtune.training.loop import StepEvent
from lmtune.training.progress import StepProgress
from lmtune.training.state import TrainState
from tests.workplace import config_of, finetune, make_workplace, write_rows


def scores(**values: Any) -> Scores:
    return Scores(**{
        "loss": 1.0, "perplexity": 2.0, "token_accuracy": 0.5, "sequence_accuracy": 0.5, "exact_match": None, "rows": 4,
        "exact_match_rows": 0, **values,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [("loss", [0.5, 0.3, 0.4], 2), ("token_accuracy", [0.5, 0.3, 0.7], 3), ("exact_match", [0.6, 0.6, 0.1], 1)],
)
def test_the_best_step_is_that_of_the_metric_in_its_direction(metric: str, values: list[float], best: int) -> None:
    given = iter(values)
    hook = EvaluationHook(
        lambda: scores(**{metric: next(given)}), metric, direction_of(metric), 1, StepProgress(3, 1, enabled=False)
    )
    stopping, state, answers = EarlyStoppingHook(1), TrainState(), list[str]()
    for step in range(1, 4):
        state.step = step
        event: Any = StepEvent(None, None, state, 0.1, 1.0, 3)  # type: ignore[arg-type]
        hook.after_step(event)
        answers.append(stopping.after_step(event))
    assert state.best_step == best
    assert "stop" in answers or best == 3


def test_each_objective_names_what_it_measures_and_its_own_choice_first() -> None:
    for section, make in chosen._OBJECTIVES.items():
        made = make(section(), Head("single_label", ("a", "b")))
        named = METRICS[section().kind]
        assert (named[0], direction_of(named[0])) == made.selection
        own = {"loss", "perplexity", "token_accuracy", "sequence_accuracy", "exact_match", "macro_f1", "auc", "r2",
               "spearman", *made.metrics}  # fmt: skip
        assert set(named) <= own
    assert METRICS.keys() == {section().kind for section in chosen._OBJECTIVES}


def test_a_metric_that_the_objective_has_not_is_named_with_those_that_it_has() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.metric: got 'macro_f1'; should be loss, .* or exact_match"):
        config_of(evaluation__metric="macro_f1")
    with pytest.raises(ConfigError, match=r"exact_match needs rows to answer; raise evaluation\.exact_match_rows"):
        config_of(evaluation__metric="exact_match", evaluation__exact_match_rows=0)
    config: FinetuneConfig = config_of(evaluation__metric="macro_f1", objective__kind="classification")
    assert config.evaluation.metric == "macro_f1"


@pytest.mark.slow
def test_exact_match_may_choose_the_best_step(tmp_path: Path) -> None:
    """Answers are generated at each evaluation; the step that is kept has the most."""
    place = make_workplace(tmp_path / "work")
    rows = [{"prompt": f"Say number {n}!", "completion": "It is 7."} for n in range(12)]
    write_rows(place / "train.jsonl", rows)
    write_rows(place / "validation.jsonl", rows[:6])
    run, summary = finetune(
        place, evaluation__metric="exact_match", evaluation__every_steps=4, evaluation__exact_match_rows=6,
        evaluation__patience=2, train__max_steps=24, train__learning_rate=3e-2,
    )  # fmt: skip
    assert summary["tuned"]["exact_match"] > summary["base"]["exact_match"]
    said = run.config.read_text()
    assert "metric: exact_match" in said


@pytest.mark.slow
def test_a_metric_that_cannot_be_measured_is_named(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "work")
    write_rows(place / "train.jsonl", [{"text": f"number {n}", "label": "abc"[n % 3]} for n in range(12)])
    with pytest.raises(LmtuneError, match=r"evaluation\.metric: auc cannot be measured on the validation rows"):
        finetune(
            place, data__validation="train.jsonl", objective__kind="classification", evaluation__metric="auc",
            evaluation__every_steps=1, train__max_steps=2,
        )  # fmt: skip
