"""Damage on the disk: a checkpoint that is not what was written is passed over and said, and never a silent restart."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmtune.training.checkpoint import checkpoint_folders, problem_of, prune_checkpoints
from tests.faults.choosing import few
from tests.jobs import job_for, train
from tests.processes import KILL, at_call, at_step, lmtune, said
from tests.workplace import RESTLESS, checkpoints, lasting, make_workplace, write_config, written_files

KEPT = [2, 3, 4, 6]  # of the restless run: best steps and every third


@pytest.fixture(scope="session")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A restless run that was killed in its seventh step, with all its checkpoints."""
    folder = make_workplace(tmp_path_factory.mktemp("killed"))
    write_config(folder, **RESTLESS)
    code = lmtune(folder, "finetune", "run.yaml", "run.keep_checkpoints=99", trouble=at_step(7, KILL))
    assert code == -signal.SIGKILL
    assert checkpoints(folder) == [f"step-{step:06d}" for step in KEPT]
    return folder


@pytest.fixture
def place(tmp_path: Path, killed: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(killed, tmp_path / "work"))


def newest(place: Path) -> Path:
    """The newest checkpoint, damaged or not."""
    return checkpoint_folders(place / "runs/trial/checkpoints")[-1]


def cut(path: Path) -> None:
    """Keep the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """One bit in the middle; the size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


ADAPTER, OPTIMIZER, STATE = "adapter_model.safetensors", "optimizer.safetensors", "state.json"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "10 a truncated adapter": (lambda path: cut(path / ADAPTER), f"{ADAPTER} is not what was written"),
    "11 a truncated optimizer": (lambda path: cut(path / OPTIMIZER), f"{OPTIMIZER} is not what was written"),
    "12 one flipped bit of the optimizer": (lambda path: flip(path / OPTIMIZER), f"{OPTIMIZER} is not what was"),
    "13 no state": (lambda path: (path / STATE).unlink(), f"{STATE} is missing"),
    "14 no manifest": (lambda path: (path / "manifest.json").unlink(), "no manifest.json"),
}


@pytest.mark.parametrize(
    "kind", few(DAMAGE, "10 a truncated adapter", "12 one flipped bit of the optimizer", "14 no manifest")
)
def test_10_to_14_a_damaged_checkpoint_is_said_and_the_one_before_is_used(
    place: Path, undisturbed: dict[str, Any], kind: str
) -> None:
    damage, message = DAMAGE[kind]
    damage(newest(place))
    assert lmtune(place, "finetune", "run.yaml") == 0, said(place)
    assert f"warning: skipped a damaged checkpoint: step-000006: {message}" in said(place)
    assert "resumes after step 4" in said(place)
    assert lasting(place) == undisturbed
    assert all(problem_of(path) is None for path in checkpoint_folders(place / "runs/trial/checkpoints"))


def test_15_if_all_are_damaged_the_run_is_refused_and_nothing_is_written(place: Path) -> None:
    for number, path in enumerate(checkpoint_folders(place / "runs/trial/checkpoints")):
        DAMAGE[list(DAMAGE)[number]][0](path)
    before = written_files(place / "runs")
    assert lmtune(place, "finetune", "run.yaml") == 2
    text = said(place)
    assert text.count("error: ") == 1
    assert "runs/trial/checkpoints: every checkpoint is damaged" in text
    assert all(f"  step-{step:06d}: " in text for step in KEPT)
    assert "begin again with run.resume=never" in text
    assert "Traceback" not in text
    after = written_files(place / "runs")
    assert {**after, "trial/.lock": b""} == {**before, "trial/.lock": b""}


def test_15_if_all_are_gone_the_run_does_not_silently_restart(place: Path) -> None:
    """Six steps are recorded, and the first checkpoint was due after the third."""
    shutil.rmtree(place / "runs/trial/checkpoints")
    before = written_files(place / "runs")
    assert lmtune(place, "finetune", "run.yaml") == 2
    assert "error: runs/trial/checkpoints: no checkpoint is there, though 6 steps are recorded; restore" in said(place)
    assert "begin again with run.resume=never" in said(place)
    after = written_files(place / "runs")
    assert {**after, "trial/.lock": b""} == {**before, "trial/.lock": b""}


def test_15_records_of_an_earlier_start_are_not_judged_by_the_settings_of_a_later_one(tmp_path: Path) -> None:
    """Five steps without a checkpoint were right when they were done; a checkpoint is due earlier now."""
    folder = make_workplace(tmp_path / "work")
    before_training = at_call("lmtune.training.run", "base_scores", KILL)
    write_config(folder, run__checkpoint_every_steps=1000)
    assert lmtune(folder, "finetune", "run.yaml", trouble=at_step(6, KILL)) == -signal.SIGKILL
    sooner = ("finetune", "run.yaml", "run.checkpoint_every_steps=2")
    assert lmtune(folder, *sooner, trouble=before_training) == -signal.SIGKILL
    assert "warning: runs/trial: no checkpoint yet; restarting from step 0 (5 steps lost)" in said(folder)
    assert lmtune(folder, *sooner) == 0, said(folder)
    assert [line["step"] for line in lasting(folder)["metrics"]] == list(range(1, 9))


DAMAGED_RECORDS: dict[str, tuple[bytes, str]] = {
    "metrics.jsonl": (b'{"step": 1, "loss": 1}\n', "runs/trial/metrics.jsonl:1: damaged"),
    "results.csv": (b"step,\n1\xff,2\n", "runs/trial/results.csv:2: damaged"),
    "predictions.jsonl": (b'"\xff"\n', "runs/trial/predictions.jsonl:1: damaged"),
    "summary.json": (b'{"status": "running", "base": 3}', "runs/trial/summary.json: damaged: base: got 3"),
    "config.yaml": (b"model: {name: \xe9}\n", "runs/trial/config.yaml: not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("name", few(DAMAGED_RECORDS, "metrics.jsonl"))
def test_damaged_records_are_named_and_nothing_is_written(place: Path, name: str) -> None:
    content, message = DAMAGED_RECORDS[name]
    (place / "runs/trial" / name).write_bytes(content)
    before = written_files(place / "runs")
    assert lmtune(place, "finetune", "run.yaml") == 2, said(place)
    assert f"error: {message}" in said(place)
    after = written_files(place / "runs")
    assert {**after, "trial/.lock": b""} == {**before, "trial/.lock": b""}


def test_27_what_a_crash_left_half_written_is_removed_and_never_read(place: Path, undisturbed: dict[str, Any]) -> None:
    run = place / "runs/trial"
    shutil.copytree(newest(place), run / "checkpoints/.staging-step-000007")  # whole, but without its name
    (run / ".staging-adapter").mkdir()
    (run / ".staging-adapter/adapter_model.safetensors").write_bytes(b"half")
    (run / ".summary.json.123.tmp").write_text('{"status": "comp')
    assert lmtune(place, "finetune", "run.yaml") == 0, said(place)
    assert "resumes after step 6" in said(place)
    assert lasting(place) == undisturbed
    assert [path.name for path in run.rglob(".*")] == [".lock"]


def test_30_a_hundred_checkpoints_take_the_room_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of a third while it is being written."""
    sizes: list[int] = []

    def measured(*args: Any) -> None:
        sizes.append(sum(path.stat().st_size for path in tmp_path.rglob("checkpoints/*/*")))
        prune_checkpoints(*args)

    monkeypatch.setattr("lmtune.training.hooks.prune_checkpoints", measured)
    job = job_for(tmp_path / "run", train__max_steps=100, run__checkpoint_every_steps=1, run__keep_checkpoints=2)
    train(job)
    assert len(sizes) == 100
    assert max(sizes) < 3.01 * sizes[0]
    assert [path.name for path in checkpoint_folders(job.run.checkpoints)] == ["step-000099", "step-000100"]
