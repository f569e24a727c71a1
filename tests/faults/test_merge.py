"""A merge that is killed leaves the earlier model, the new one or none under its name, and never half of one."""

import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from tests.faults.choosing import few
from tests.faults.test_disk import full_when_flushed, limit_files
from tests.processes import KILL, Trouble, at_call, ended, lmtune, said, start
from tests.workplace import finetune, make_workplace, written_files


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its merged model."""
    folder = make_workplace(tmp_path_factory.mktemp("merged"))
    finetune(folder, train__max_steps=2)
    assert lmtune(folder, "merge", "trial") == 0, said(folder)
    return folder


def when_replacing(module: str, function: str, count: int = 1) -> Trouble:
    """Killed at that call, counted from the moment when the new folder is complete."""
    return at_call("lmtune.io.atomic", "replace_folder", at_call(module, function, KILL, count))


KILLS = {
    "before the weights are written": at_call("lmtune.models.merge", "_write_weights", KILL),
    "when the weights are written": at_call("lmtune.models.verify", "_load_plain", KILL),
    "before the card is written": at_call("lmtune.runs.cards", "merged_card", KILL),
    "before it is flushed": when_replacing("os", "fsync"),
    "before the earlier one goes": when_replacing("os", "rename", 1),
    "before the new one comes": when_replacing("os", "rename", 2),
    "while the earlier one is deleted": when_replacing("os", "unlink", 3),
}


@pytest.mark.parametrize(
    "kind",
    few(KILLS, "before the card is written", "before the new one comes", "while the earlier one is deleted"),
)
def test_26_killed_in_the_middle_of_a_merge(merged: Path, tmp_path: Path, kind: str) -> None:
    place = Path(shutil.copytree(merged, tmp_path / "work"))
    model = place / "runs/trial/merged"
    new = written_files(model)
    (model / "from-before.txt").touch()
    earlier = written_files(model)
    assert lmtune(place, "merge", "trial", trouble=KILLS[kind]) == -signal.SIGKILL
    left = {"before the new one comes": {}, "while the earlier one is deleted": new}
    assert written_files(model) == left.get(kind, earlier)
    assert lmtune(place, "merge", "trial") == 0, said(place)
    assert written_files(model) == new
    assert [path.name for path in model.parent.glob(".*")] == [".lock"]


def test_26_a_second_merge_at_the_same_time_is_refused_and_the_first_is_not_disturbed(
    merged: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(merged, tmp_path / "work"))
    model = place / "runs/trial/merged"
    whole = written_files(model)
    staging = model.with_name(".staging-merged")
    first = start(
        place, "merge", "trial", trouble=at_call("lmtune.models.verify", "_load_plain", partial(time.sleep, 12))
    )
    while not (staging / "tokenizer_config.json").exists():  # among the last to be written
        assert first.is_alive()
        time.sleep(0.05)
    time.sleep(1)
    half = written_files(staging)
    assert ended(start(place, "merge", "trial", output="second")) == 2
    assert "error: runs/trial/merged: another lmtune process is writing this folder now" in said(place, "second")
    assert written_files(staging).items() >= half.items()
    assert ended(first) == 0, said(place)
    assert written_files(model) == whole
    assert not staging.exists()


def test_a_refused_merge_leaves_no_folder_behind(merged: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(merged, tmp_path / "work"))
    (place / "base/model.safetensors").write_text("<html>")
    before = sorted(place.rglob("*"))
    assert lmtune(place, "merge", "trial", "--output", "new/deep/model") == 2
    (place / "output").unlink()
    assert sorted(place.rglob("*")) == [path for path in before if path.name != "output"]


FULL: dict[str, tuple[Trouble, str]] = {
    "the weights": (at_call("lmtune.models.merge", "_write_weights", partial(limit_files, 20_000)), ": File too large"),
    "a config": (at_call("lmtune.models.merge", "_write_weights", partial(limit_files, 100)), ": File too large"),
    "the flush": (
        at_call("lmtune.io.atomic", "replace_folder", full_when_flushed), ": No space left on device",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", few(FULL, "the weights"))
def test_07_a_disk_that_is_full_while_a_merge_is_written(merged: Path, tmp_path: Path, what: str) -> None:
    """The merged model from before stays as it was."""
    place = Path(shutil.copytree(merged, tmp_path / "work"))
    before = written_files(place / "runs")
    trouble, message = FULL[what]
    assert lmtune(place, "merge", "trial", trouble=trouble) == 1
    text = " ".join(said(place).split())
    assert f"error: runs/trial/merged{message}; make room or permit it, then start the same command again" in text
    assert "Traceback" not in text
    assert written_files(place / "runs") == before
