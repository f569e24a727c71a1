"""A sweep's trials are ordinary runs over one loaded base; its best settings run as they are."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from lmtune.config.load import load_config
from lmtune.config.schema import FinetuneConfig
from lmtune.errors import CheckpointError, ConfigError
from lmtune.runs.store import RunDirectory
from lmtune.search.results import SweepResult
from lmtune.search.space import read_space
from lmtune.search.sweep import Plan, sweep, trial_config
from lmtune.training import shared
from lmtune.training.run import run_finetune
from tests.workplace import config_of, inside, lasting, make_workplace

pytestmark = pytest.mark.slow  # seconds together; left out of `make test-fast`

OVER = ["train.learning_rate=1e-4..1e-1:log", "tuning.rank=2,4"]
SMALL = {"train__max_steps": 3, "evaluation__exact_match_rows": 0}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return make_workplace(tmp_path / "work")


def plan_of(over: list[str] = OVER, trials: int = 3, prune: bool = False, **changes: Any) -> Plan:
    return Plan(read_space(config_of(**{**SMALL, **changes}), over), trials, prune=prune)


def search(place: Path, plan: Plan) -> SweepResult:
    with inside(place):
        return sweep(plan)


def test_trials_are_runs_as_alone_over_one_base(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, load = [], shared.load_model
    monkeypatch.setattr(shared, "load_model", lambda *args: (loaded.append(1), load(*args))[1])
    plan = plan_of()
    result = search(place, plan)
    assert len(loaded) == 1
    assert [trial.status for trial in result.trials] == ["complete"] * 3
    for trial in result.trials:
        own = trial_config(plan, trial.number, trial.values)
        alone = config_of(
            **SMALL, train__learning_rate=own.train.learning_rate, tuning__rank=own.tuning.rank,
            evaluation__score_base=False, run__name=f"alone-{trial.number}",
        )  # fmt: skip
        with inside(place):
            run_finetune(alone, RunDirectory.of(alone.run))
        name = "adapter_model.safetensors"
        one, other = lasting(place, f"trial/trial-{trial.number:03d}"), lasting(place, f"alone-{trial.number}")
        assert one["adapter"][name] == other["adapter"][name]
        assert one["metrics"] == other["metrics"]
        assert trial.score == other["scores"][2]["loss"]
    best = min(result.trials, key=lambda trial: trial.score or math.inf)
    assert result.best == best.number
    folder = place / "runs" / "trial"
    assert json.loads((folder / "sweep.json").read_text())["best"] == best.number
    for picture in ("history.svg", "coordinates.svg"):
        assert (folder / picture).read_text().endswith("</svg>\n")
    with inside(place):
        config = load_config(FinetuneConfig, folder / "best.yaml")
        assert config.run.name == "trial-best"
        assert run_finetune(config, RunDirectory.of(config.run)).summary.tuned["loss"] == best.score


def test_more_trials_go_on_and_other_searches_are_refused(place: Path) -> None:
    first = search(place, plan_of(trials=2))
    again = search(place, plan_of(trials=4))
    assert again.trials[:2] == first.trials
    assert len(again.trials) == 4
    assert search(place, plan_of(trials=4)) == again
    with pytest.raises(CheckpointError, match=r"--over\.tuning\.rank: was '2,4', now '2,8'"):
        search(place, plan_of([OVER[0], "tuning.rank=2,8"]))
    with pytest.raises(CheckpointError, match=r"train\.seed: was 0, now 1"):
        search(place, plan_of(train__seed=1))
    (place / "runs" / "trial" / "crossval.json").write_text("{}")
    with pytest.raises(ConfigError, match="is something else already"):
        search(place, plan_of())


def test_few_combinations_are_tried_once_each(place: Path) -> None:
    result = search(place, plan_of(["tuning.rank=2,4", "train.batch_size=4,8"], trials=20))
    tried = [tuple(trial.values.values()) for trial in result.trials]
    assert sorted(tried) == [("2", "4"), ("2", "8"), ("4", "4"), ("4", "8")]


def test_trials_that_fall_behind_are_pruned_and_those_that_diverge_are_the_worst(place: Path) -> None:
    """Rates from far too small to far too large."""
    over = ["train.learning_rate=1e-2,8e-3,6e-3,5e-3,7e-3,1e-9,2e-9,3e-9,10.0"]
    result = search(place, plan_of(over, 9, True, evaluation__every_steps=1, train__max_grad_norm=None))
    status = {trial.values["train.learning_rate"]: trial.status for trial in result.trials}
    assert status["1e-2"] == "complete"
    assert {status["1e-9"], status["2e-9"], status["3e-9"]} == {"pruned"}
    assert status["10.0"] in ("pruned", "failed")
    pruned = next(trial for trial in result.trials if trial.status == "pruned")
    assert "is behind the other trials" in pruned.reason
    run = RunDirectory(place / "runs" / "trial" / f"trial-{pruned.number:03d}")
    assert (run.read_summary().status, run.read_summary().reason) == ("interrupted", pruned.reason)


def test_a_deleted_folder_of_a_trial_does_not_end_the_search(place: Path) -> None:
    search(place, plan_of(trials=2))
    shutil.rmtree(place / "runs" / "trial" / "trial-000")
    assert len(search(place, plan_of(trials=3)).trials) == 3


def test_what_is_needed_is_said_before_anything_is_loaded(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"--prune: needs evaluation\.every_steps"):
        search(place, plan_of(prune=True))
    with pytest.raises(ConfigError, match=r"data\.validation_fraction: 0 holds no row out"):
        search(place, plan_of(data__validation=None, data__validation_fraction=0.0))
    assert not (place / "runs").exists()
