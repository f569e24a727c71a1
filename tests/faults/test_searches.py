"""A cross-validation and a sweep that are killed: the same command goes on, and ends as if nothing had been."""

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.choosing import few
from tests.processes import KILL, Trouble, at_call, ended, lmtune, said, start
from tests.workplace import RESTLESS, lasting, make_workplace, write_config

SMALL: dict[str, Any] = {
    **RESTLESS, "train__max_steps": 4, "run__checkpoint_every_steps": 1, "evaluation__exact_match_rows": 2,
}  # fmt: skip
CROSSVAL = ("crossval", "run.yaml", "--folds", "3")
SWEEP = ("sweep", "run.yaml", "--over", "train.learning_rate=1e-4..1e-1:log", "tuning.rank=2,4", "--trials", "4")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the settings of a search that is not begun yet."""
    folder = make_workplace(tmp_path / "work")
    write_config(folder, **SMALL)
    return folder


def undisturbed(factory: pytest.TempPathFactory, command: tuple[str, ...], look: Callable[[Path], Any]) -> Any:
    """What the command leaves where nothing goes wrong."""
    folder = make_workplace(factory.mktemp("undisturbed"))
    write_config(folder, **SMALL)
    assert lmtune(folder, *command) == 0, said(folder)
    return look(folder)


def folds_of(folder: Path) -> list[Any]:
    """Every fold's lasting files, and the figures over them."""
    figures = json.loads((folder / "runs/trial/crossval.json").read_text())
    return [*(lasting(folder, f"trial/fold-{fold}") for fold in (1, 2, 3)), figures]


def trials_of(folder: Path) -> list[Any]:
    """Every trial's lasting files, the figures but for times, and the best settings."""
    sweep = folder / "runs/trial"
    figures = json.loads((sweep / "sweep.json").read_text())
    for trial in figures["trials"]:
        trial.pop("seconds")
    runs = sorted(path.name for path in sweep.glob("trial-*"))
    return [*(lasting(folder, f"trial/{run}") for run in runs), figures, (sweep / "best.yaml").read_text()]


@pytest.fixture(scope="module")
def whole_crossval(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return undisturbed(tmp_path_factory, CROSSVAL, folds_of)


@pytest.fixture(scope="module")
def whole_sweep(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return undisturbed(tmp_path_factory, SWEEP, trials_of)


SECOND_RUN = at_call("lmtune.training.loop", "seed_step", KILL, 4 + 3)  # its third step
IN_FOLDS: dict[str, Trouble] = {
    "in the second fold": SECOND_RUN,
    "before the last fold": at_call("lmtune.search.crossval", "run_finetune", KILL, 3),
    "before the figures": at_call("lmtune.search.crossval", "write_json", KILL),
}
IN_TRIALS: dict[str, Trouble] = {
    "in the second trial": SECOND_RUN,
    "while values are drawn": at_call("lmtune.search.sweep", "_suggest", KILL, 4),
    "before the study is told": at_call("optuna.study", "Study.tell", KILL, 2),
    "before the figures": at_call("lmtune.search.sweep", "write_json", KILL, 3),
}


@pytest.mark.parametrize("kind", few(IN_FOLDS, "in the second fold"))
def test_a_cross_validation_goes_on_where_it_was_killed(place: Path, whole_crossval: list[Any], kind: str) -> None:
    assert lmtune(place, *CROSSVAL, trouble=IN_FOLDS[kind]) == -signal.SIGKILL
    assert not (place / "runs/trial/crossval.json").exists()
    assert lmtune(place, *CROSSVAL) == 0, said(place)
    assert folds_of(place) == whole_crossval


@pytest.mark.parametrize("kind", few(IN_TRIALS, "in the second trial", "before the study is told"))
def test_a_sweep_goes_on_where_it_was_killed(place: Path, whole_sweep: list[Any], kind: str) -> None:
    assert lmtune(place, *SWEEP, trouble=IN_TRIALS[kind]) == -signal.SIGKILL
    assert lmtune(place, *SWEEP) == 0, said(place)
    assert trials_of(place) == whole_sweep
    assert not list((place / "runs/trial").glob(".trial-*"))


def test_machines_share_the_trials_by_the_address_of_a_study(tmp_path: Path) -> None:
    """Two working folders, as two machines have them, and a new study in a third one."""
    folders = [make_workplace(tmp_path / name) for name in ("one", "other")]
    (tmp_path / "shared").mkdir()
    sweep = ("sweep", "run.yaml", "--over", "tuning.rank=2,4", "train.batch_size=2,4,8", "--trials", "20")
    sweep = (*sweep, "--storage", f"sqlite:///{tmp_path}/shared/study.db")
    for folder in folders:
        write_config(folder, **SMALL)
    both = [start(folder, *sweep) for folder in folders]
    assert [ended(one) for one in both] == [0, 0], "\n".join(map(said, folders))
    made = [set(re.findall(r"^trial \d+: .*?: ", said(folder), re.MULTILINE)) for folder in folders]
    assert len(made[0] | made[1]) == len(made[0]) + len(made[1]) == 6, made
    tables = []
    for folder in folders:
        assert lmtune(folder, *sweep) == 0, said(folder)
        figures = json.loads((folder / "runs/trial/sweep.json").read_text())
        assert {trial["status"] for trial in figures["trials"]} == {"complete"}
        tables.append((figures, (folder / "runs/trial/best.yaml").read_text()))
    assert tables[0] == tables[1]
    assert len({tuple(trial["values"].values()) for trial in tables[0][0]["trials"]}) == 6


def test_two_processes_share_the_trials(place: Path) -> None:
    """Each trial is made by one of them, and there are as many as were asked for."""
    both = [start(place, *SWEEP, output=f"output{number}") for number in (0, 1)]
    assert [ended(one) for one in both] == [0, 0], said(place, "output0") + said(place, "output1")
    figures = json.loads((place / "runs/trial/sweep.json").read_text())
    assert [trial["status"] for trial in figures["trials"]] == ["complete"] * 4
    made = [len(re.findall(r"^trial \d+: ", said(place, f"output{number}"), re.MULTILINE)) for number in (0, 1)]
    assert sum(made) == 4
