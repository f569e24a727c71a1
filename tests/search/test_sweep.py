"""A sweep's trials are ordinary runs over one loaded base; its best settings run as they are."""

import json
import math
import shutil
from dataclasses import replace
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


GRID = ["tuning.rank=2,4", "train.batch_size=4,8"]


def shared_plan(folder: Path, over: list[str] = OVER, trials: int = 3) -> Plan:
    """With a study beside the working folders."""
    return replace(plan_of(over, trials), storage=f"sqlite:///{folder}/shared.db")


def test_folders_that_share_a_study_all_get_its_table_and_the_best_settings(tmp_path: Path) -> None:
    one, other = (make_workplace(tmp_path / name) for name in ("one", "other"))
    first = search(one, shared_plan(tmp_path, trials=2))
    second = search(other, shared_plan(tmp_path, trials=3))
    assert second.trials[:2] == first.trials
    assert search(one, shared_plan(tmp_path, trials=3)) == second
    here, there = one / "runs" / "trial", other / "runs" / "trial"
    assert sorted(path.name for path in here.glob("trial-*")) == ["trial-000", "trial-001"]
    assert sorted(path.name for path in there.glob("trial-*")) == ["trial-002"]
    assert not (here / "study.db").exists()
    for name in ("best.yaml", "sweep.json", "history.svg"):
        assert (here / name).read_text() == (there / name).read_text(), name
    with inside(other):
        config = load_config(FinetuneConfig, there / "best.yaml")
    best = second.trials[second.best or 0].values
    assert (f"{config.train.learning_rate:g}", str(config.tuning.rank)) == (
        f"{float(best['train.learning_rate']):g}", best["tuning.rank"]
    )  # fmt: skip


def another_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine takes a trial between the look of this one and its own trial."""
    optuna = pytest.importorskip("optuna")
    asked, ask = [], optuna.Study.ask

    def asking(study: Any) -> Any:
        asked.append(1)
        if len(asked) == 2:
            ask(study)
        return ask(study)

    monkeypatch.setattr(optuna.Study, "ask", asking)


def test_machines_that_begin_at_once_try_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    another_begins(monkeypatch)
    result = search(make_workplace(tmp_path / "work"), shared_plan(tmp_path, GRID, 4))
    tried = [(trial.status, *trial.values.values()) for trial in result.trials]
    assert tried == [("complete", "2", "4"), ("running",), ("complete", "4", "4"), ("complete", "4", "8")]


def test_machines_that_begin_at_once_make_no_trial_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    another_begins(monkeypatch)
    place = make_workplace(tmp_path / "work")
    result = search(place, shared_plan(tmp_path, trials=2))
    assert [trial.status for trial in result.trials] == ["complete", "running"]
    more = search(place, shared_plan(tmp_path, trials=3))
    assert [(trial.number, trial.status) for trial in more.trials] == [
        (0, "complete"), (1, "running"), (3, "complete")
    ]  # fmt: skip


def test_a_trial_of_another_machine_is_not_taken_for_one_that_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers on two machines may have the same address and the same folder."""
    with monkeypatch.context() as patch:
        patch.setattr("lmtune.search.sweep.run_finetune", lambda *given, **more: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            search(make_workplace(tmp_path / "work"), shared_plan(tmp_path))
    (tmp_path / "work").rename(tmp_path / "elsewhere")
    result = search(make_workplace(tmp_path / "work"), shared_plan(tmp_path, trials=2))
    assert [trial.status for trial in result.trials] == ["running", "complete"]


DRIVER = "this database needs a driver; install it with pip"
REACHED = "expected the address of a database that can be reached, such as sqlite:////shared/study.db"


@pytest.mark.parametrize(
    ("address", "reason", "advice"),
    [
        ("mysql://nobody@127.0.0.1:1/x", "No module named 'MySQLdb'", DRIVER),
        ("mysqlx://nobody:secret@host/x", "mysqlx", REACHED), ("journal.log", "Could not parse", REACHED),
        ("sqlite:////none/such/study.db", "unable to open database file", REACHED),
    ],
)  # fmt: skip
def test_a_storage_that_cannot_be_used_is_told_before_anything_is_written(
    address: str, reason: str, advice: str, place: Path
) -> None:
    with pytest.raises(ConfigError, match="--storage: ") as raised:
        search(place, replace(plan_of(), storage=address))
    told = str(raised.value)
    assert reason in told
    assert told.endswith(advice)
    assert "\n" not in told
    assert "secret" not in told
    assert not (place / "runs").exists()
