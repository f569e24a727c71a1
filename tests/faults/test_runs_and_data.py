"""What changes around a run: another one on its folder, its data, base or settings, the clock."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmtune.data.report import DataReport, changed_files
from lmtune.training.checkpoint import checkpoint_folders
from tests.faults.choosing import few
from tests.processes import KILL, all_of, at_step, ended, lmtune, said, start
from tests.tiny import save_tiny
from tests.tokenizers import CHATML
from tests.workplace import (
    QUESTIONS,
    RESTLESS,
    lasting,
    make_workplace,
    write_config,
    write_rows,
    written_files,
)


def kept(place: Path) -> dict[str, bytes]:
    """All files of all runs, but for the lock, which every start takes."""
    return {name: content for name, content in written_files(place / "runs").items() if not name.endswith(".lock")}


def pause() -> None:
    """Say that the run is here, and wait until it may go on."""
    Path("here").touch()
    assert appears(Path("go on"))


def appears(path: Path) -> bool:
    """Whether a file is there within a minute."""
    until = time.monotonic() + 60
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.02)
    return path.exists()


def test_24_a_second_run_on_the_same_folder_is_refused(place: Path, undisturbed: dict[str, Any]) -> None:
    first = start(place, "finetune", "run.yaml", trouble=at_step(5, pause), output="first")
    assert appears(place / "here")
    before = kept(place)
    for arguments in ((), ("run.resume=never",), ("tuning.rank=2",)):
        assert lmtune(place, "finetune", "run.yaml", *arguments) == 2
        assert f"error: runs/trial is in use by another lmtune process (pid {first.pid}); wait for it" in said(place)
        assert "Traceback" not in said(place)
    assert kept(place) == before
    (place / "go on").touch()
    assert ended(first) == 0, said(place, "first")
    assert lasting(place) == undisturbed


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A restless run that was killed in its seventh step."""
    folder = make_workplace(tmp_path_factory.mktemp("killed"))
    write_config(folder, **RESTLESS)
    assert lmtune(folder, "finetune", "run.yaml", trouble=at_step(7, KILL)) == -signal.SIGKILL
    return folder


@pytest.fixture
def cut_off(tmp_path: Path, killed: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(killed, tmp_path / "cut-off"))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "rows": (lambda place: write_rows(place / "train.jsonl", QUESTIONS[1:]), "data.train: train.jsonl changed"),
    "base": (
        lambda place: save_tiny(place / "base", chat_template=CHATML, seed=7), "the base model's weights: changed"
    ),
    "rank": (lambda place: write_config(place, **RESTLESS, tuning__rank=2), "tuning.rank: was 4, now 2"),
}  # fmt: skip


@pytest.mark.parametrize("what", few(CHANGES, "rows", "rank"))
def test_25_a_run_whose_data_base_or_settings_changed_is_refused_by_name(cut_off: Path, what: str) -> None:
    change, message = CHANGES[what]
    change(cut_off)
    before = kept(cut_off)
    assert lmtune(cut_off, "finetune", "run.yaml") == 2
    text = said(cut_off)
    assert f"error: runs/trial: cannot resume: settings changed since this run started\n  {message}\n" in text
    assert "put these back, or choose a new run.name, or begin again with run.resume=never" in text
    assert "Traceback" not in text
    assert kept(cut_off) == before
    assert lmtune(cut_off, "finetune", "run.yaml", "run.resume=never") == 0, said(cut_off)
    assert (cut_off / "runs/trial-old-1/checkpoints").is_dir()


def set_clock_back() -> None:
    """It is 2001, and each look at the clock finds it earlier."""
    now = [1e9]

    def earlier() -> float:
        now[0] -= 3600
        return now[0]

    time.time = earlier
    time.time_ns = lambda: int(earlier() * 1e9)


def test_28_a_clock_that_is_set_back(place: Path, undisturbed: dict[str, Any]) -> None:
    """Which checkpoint is the newest is told by its step; durations are measured by a clock that only goes forward."""
    trouble = all_of(at_step(3, set_clock_back), at_step(7, KILL))
    assert lmtune(place, "finetune", "run.yaml", trouble=trouble) == -signal.SIGKILL
    for age, path in enumerate(checkpoint_folders(place / "runs/trial/checkpoints")):
        for file in (*path.iterdir(), path):
            os.utime(file, (1e9 - 1e6 * age,) * 2)
    assert lmtune(place, "finetune", "run.yaml", trouble=set_clock_back) == 0, said(place)
    assert "resumes after step 6" in said(place)
    assert lasting(place) == undisturbed
    lines = (place / "runs/trial/metrics.jsonl").read_text().splitlines()
    assert all(0 < json.loads(line)["seconds"] < 60 for line in lines)


def add_row() -> None:
    """One more row in the training data."""
    with open("train.jsonl", "a", encoding="utf-8") as file:
        file.write('{"prompt": "New?", "completion": "Yes."}\n')


def test_29_data_that_changes_while_the_run_trains_is_said_at_the_next_start(
    place: Path, undisturbed: dict[str, Any]
) -> None:
    """The run itself goes on with the rows that it began with."""
    rows = (place / "train.jsonl").read_bytes()
    assert lmtune(place, "finetune", "run.yaml", trouble=all_of(at_step(3, add_row), at_step(7, KILL))) < 0
    assert lmtune(place, "finetune", "run.yaml") == 2
    assert "\n  data.train: train.jsonl changed\n" in said(place)
    (place / "train.jsonl").write_bytes(rows)
    assert lmtune(place, "finetune", "run.yaml", trouble=at_step(8, add_row)) == 0, said(place)
    assert lasting(place) == undisturbed
    assert lmtune(place, "finetune", "run.yaml") == 2
    assert "\n  data.train: train.jsonl changed\n" in said(place)


def data(train: dict[str, str], validation: dict[str, str] | int | None = None) -> DataReport:
    """The report on these files, by name with their content."""
    parts = [
        {"files": list(part), "sha256": list(part.values())} if isinstance(part, dict)
        else None if part is None else {"held_out": part}
        for part in (train, validation)
    ]  # fmt: skip
    return DataReport.from_dict({"template": "plain text", "train": parts[0], "validation": parts[1]})


ONE = {"a.jsonl": "1"}
TWO = {"a.jsonl": "1", "b.jsonl": "2"}
BEFORE_AND_NOW: dict[str, tuple[DataReport, DataReport, list[str]]] = {
    "only a name": (data(ONE, 3), data({"b.jsonl": "1"}, 3), []),
    "both parts": (
        data(TWO, {"v.jsonl": "8"}), data({**TWO, "a.jsonl": "3"}, {"v.jsonl": "9"}),
        ["data.train: a.jsonl changed", "data.validation: v.jsonl changed"],
    ),
    "another file": (data(ONE), data({"b.jsonl": "2"}), ["data.train: b.jsonl is new, a.jsonl is gone"]),
    "the order": (
        data(TWO), data({"b.jsonl": "2", "a.jsonl": "1"}), ["data.train: the same files in another order"],
    ),
    "held out of train, now a file": (
        data(ONE, 3), data(ONE, {"v.jsonl": "9"}),
        ["data.validation: v.jsonl is new, a part of data.train is gone"],
    ),
    "a file, now none": (data(ONE, {"v.jsonl": "9"}), data(ONE), ["data.validation: v.jsonl is gone"]),
}  # fmt: skip


@pytest.mark.parametrize("what", BEFORE_AND_NOW)
def test_25_what_changed_of_the_data_is_named(what: str) -> None:
    before, now, expected = BEFORE_AND_NOW[what]
    assert changed_files(before, now) == expected
