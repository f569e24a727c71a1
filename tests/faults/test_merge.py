"""A merge that is killed leaves the earlier model, the new one or none under its name, and never half of one."""

import shutil
import signal
from pathlib import Path

import pytest

from tests.faults.choosing import few
from tests.processes import KILL, Trouble, at_call, lmtune, said
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
    return at_call("lmtune.models.merging", "replace_folder", at_call(module, function, KILL, count))


KILLS = {
    "before the weights are written": at_call("lmtune.models.merging", "_write", KILL),
    "when the weights are written": at_call("lmtune.models.merging", "_plain", KILL),
    "before the card is written": at_call("lmtune.report", "merged_card", KILL),
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
