"""`run.trackers`: what TensorBoard and Trackio have written is what was measured; one that fails fails no run."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmtune.errors import ConfigError
from lmtune.runs.store import RunDirectory
from lmtune.training.trackers import require_trackers, shared_settings
from tests.processes import KILL, at_step, completed, lmtune
from tests.workplace import config_of, environment, finetune, make_workplace, write_config


def metrics_of(run: RunDirectory) -> dict[int, dict[str, float]]:
    """`metrics.jsonl` by step."""
    lines = map(json.loads, run.metrics.read_text().splitlines())
    return {line["step"]: line for line in lines}


def scalars(run: RunDirectory) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: (step, value) by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run.path / "tensorboard")).Reload()
    return {tag: [(one.step, one.value) for one in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_tensorboard_shows_what_the_run_measured_also_after_a_crash(tmp_path: Path) -> None:
    folder = make_workplace(tmp_path)
    write_config(folder, run__trackers=["tensorboard"], evaluation__every_steps=4)
    assert lmtune(folder, "finetune", "run.yaml", trouble=at_step(6, KILL)) == -9
    assert lmtune(folder, "finetune", "run.yaml") == 0
    run = RunDirectory(folder / "runs" / "trial")
    shown, metrics = scalars(run), metrics_of(run)
    for name in ("loss", "learning_rate", "grad_norm"):
        assert [step for step, _ in shown[f"train/{name}"]] == [1, 2, 3, 4, 5, 6, 7, 8]
        assert dict(shown[f"train/{name}"]) == pytest.approx({step: line[name] for step, line in metrics.items()})
    assert [step for step, _ in shown["validation/loss"]] == [4, 8]
    summary = run.read_summary()
    assert summary.tuned is not None
    assert summary.base is not None
    assert shown["tuned/loss"] == [(8, pytest.approx(summary.tuned["loss"]))]
    assert shown["base/loss"] == [(0, pytest.approx(summary.base["loss"]))]
    written = b"".join(path.read_bytes() for path in (run.path / "tensorboard").rglob("*") if path.is_file())
    assert b"train.batch_size" in written
    for private in (b"train.jsonl", str(folder).encode(), b"What is number"):
        assert private not in written


def test_trackio_holds_what_the_run_measured(tmp_path: Path) -> None:
    folder = make_workplace(tmp_path)
    write_config(folder, run__trackers=["trackio"])
    variables = {**environment(folder), "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = completed(folder, "finetune", "run.yaml", variables=variables)
    assert done.returncode == 0, done.stderr
    assert "rackio" not in done.stdout
    with sqlite3.connect(tmp_path / "trackio" / "lmtune.db") as base:
        rows = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
        (settings,) = base.execute("select cast(config as text) from configs").fetchone()
    assert {name for name, *_ in rows} == {"trial"}
    losses = {step: tree["train/loss"] for _, step, text in rows if "train/loss" in (tree := json.loads(text))}
    assert losses == {step: line["loss"] for step, line in metrics_of(RunDirectory(folder / "runs" / "trial")).items()}
    assert json.loads(settings)["train.batch_size"] == 4
    assert "train.jsonl" not in settings
    assert str(folder) not in settings


class Fake:
    """A tracker that fails at its third step."""

    told: list[tuple[str, int | None]]

    def __init__(self, **options: Any) -> None:
        self.options = options
        type(self).told = []

    def start(self) -> None:
        pass

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append(("settings", None))

    def log(self, values: dict[str, Any], step: int) -> None:
        if step == 3:
            raise ConnectionError("no network\nat all")
        self.told.append((next(iter(values)), step))

    def finish(self) -> None:
        self.told.append(("finish", None))


def test_a_tracker_that_fails_is_told_nothing_more_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("accelerate.tracking.LOGGER_TYPE_TO_CLASS", {"tensorboard": Fake})
    _, summary = finetune(make_workplace(tmp_path), run__trackers=["tensorboard"])
    assert summary["status"] == "complete"
    assert Fake.told == [("settings", None), ("base/loss", 0), ("train/loss", 1), ("train/loss", 2)]
    said = "run.trackers: tensorboard has failed and is told nothing more: no network at all; the run goes on"
    assert capsys.readouterr().err.count(said) == 1


def test_wandb_shows_the_run_in_the_project_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []

    class Wandb(Fake):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            made.append(options)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Settings=dict, __spec__=object()))
    monkeypatch.setattr("accelerate.tracking.LOGGER_TYPE_TO_CLASS", {"wandb": Wandb})
    folder = make_workplace(tmp_path)
    finetune(folder, run__trackers=["wandb"])
    monkeypatch.setenv("WANDB_PROJECT", "shop")
    monkeypatch.setenv("WANDB_NAME", "first")
    finetune(folder, run__trackers=["wandb"], run__name="other")
    assert [(one["run_name"], one["name"]) for one in made] == [("lmtune", "trial"), ("shop", "first")]


@pytest.mark.parametrize(
    ("names", "ways"),
    [(["tensorboard"], r"`pip install 'lmtune\[trackers\]'`"), (["wandb"], "`pip install wandb`"),
     (["trackio", "mlflow"], r"`pip install 'lmtune\[trackers\]'` and `pip install mlflow`")],
)  # fmt: skip
def test_a_missing_package_says_what_to_install(names: list[str], ways: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"run.trackers: {', '.join(names)} not installed; run {ways}"):
        require_trackers(names)


def test_settings_hold_no_path_and_no_secret() -> None:
    config = config_of(model__name="/srv/models/base", data__system="You are ours.", data__columns={"a": "prompt"})
    shared = shared_settings(config)
    assert shared["model.name"] == "base"
    assert shared["tuning.rank"] == 4
    assert not {"data.train", "data.validation", "data.system", "data.columns", "run.dir"} & set(shared)
    assert all(isinstance(value, (bool, int, float, str)) for value in shared.values())
    assert "/srv" not in json.dumps(shared)
