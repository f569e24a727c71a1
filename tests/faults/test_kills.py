"""Killed or asked to stop at any moment: the next `finetune` ends bit for bit like a run that nothing disturbed."""

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lmtune.training.checkpoint import checkpoint_folders, problem_of
from lmtune.training.resume import find_checkpoint
from tests.faults.choosing import few
from tests.faults.failpoints import killed_in_a_save, stages_of_a_save
from tests.jobs import final_weights, job_for, records
from tests.processes import (
    KILL,
    Trouble,
    after_update,
    all_of,
    at_call,
    at_step,
    in_checkpoint,
    lmtune,
    said,
    send,
    wrap,
)
from tests.workplace import checkpoints, lasting


def summary_of(place: Path) -> dict[str, Any]:
    """The run's summary."""
    return json.loads((place / "runs/trial/summary.json").read_text())


def after_backward(step: int) -> None:
    """Kill when the first micro-batch of `step` has its gradients and the next has not."""
    at_step(step, partial(_kill_after_backward))()


def _kill_after_backward() -> None:
    def backward(real: Any, *args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        KILL()

    wrap("torch", "Tensor.backward", backward)


KILLS: dict[str, Trouble] = {
    "in the middle of a step": partial(after_backward, 5),
    "before the first step": at_step(1, KILL),
    "before any checkpoint": at_step(2, KILL),
    "between a step and its record": after_update(5, KILL),
    "in the first checkpoint": in_checkpoint(1, 0, KILL),
    "in a later checkpoint": in_checkpoint(2, 1, KILL),
    "while old checkpoints are deleted": at_call("lmtune.training.hooks", "prune_checkpoints", KILL),
    "after the last step": at_step(8, KILL),
    "before the adapter is saved": at_call("lmtune.models.tuning.lora", "save_adapter", KILL),
    "before it is complete": at_call("lmtune.training.run", "add_tuned_predictions", KILL),
}


@pytest.mark.parametrize("kind", few(KILLS, "in the middle of a step", "before the adapter is saved"))
def test_01_killed_at_any_moment(place: Path, undisturbed: dict[str, Any], kind: str) -> None:
    assert lmtune(place, "finetune", "run.yaml", trouble=KILLS[kind]) == -signal.SIGKILL
    assert summary_of(place)["status"] == "running"
    assert lmtune(place, "finetune", "run.yaml") == 0, said(place)
    assert lasting(place) == undisturbed


SAVING = {"dropout": 0.3, "train__max_steps": 4, "run__checkpoint_every_steps": 1, "run__keep_checkpoints": 1}


@pytest.mark.slow
def test_02_killed_at_every_stage_of_a_checkpoints_writing(tmp_path: Path) -> None:
    """The third one, which also deletes the second; each stage in a process of its own, killed for good."""
    whole = job_for(tmp_path / "whole", **SAVING)
    weights = final_weights(whole)
    stages = stages_of_a_save(tmp_path / "stages", 3, **SAVING)
    assert {"before mkdir", "half of save_file", "half of Path.write_text", "before fsync", "before rename",
            "before unlink", "before rmdir", "the end"} <= set(stages)  # fmt: skip
    for stage, name in enumerate(stages, start=1):
        folder = tmp_path / f"stage{stage}"
        assert killed_in_a_save(folder, 3, stage, **SAVING) == -signal.SIGKILL, name
        left = checkpoint_folders(folder / "checkpoints")
        newest = max(int(path.name[5:]) for path in left if problem_of(path) is None)
        assert newest in (2, 3), name
        again = job_for(folder, **SAVING)
        again.resumed, skipped = find_checkpoint(again.run, again.parts.signature)
        assert again.resumed is not None
        assert (again.resumed.step, skipped) == (newest, []), name
        assert not list(again.run.checkpoints.glob(".*")), name
        found = final_weights(again)
        assert all(torch.equal(found[key], weight) for key, weight in weights.items()), name
        assert records(again) == records(whole), name


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_03_and_05_asked_to_stop_it_saves_the_step_and_goes_on_later(
    place: Path, undisturbed: dict[str, Any], number: int, code: int
) -> None:
    assert lmtune(place, "finetune", "run.yaml", trouble=at_step(5, send(number))) == code
    assert "stopped after step 5 of 8, which is saved; the same command resumes from there" in said(place)
    assert "Traceback" not in said(place)
    assert problem_of(place / "runs/trial/checkpoints/step-000005") is None
    assert summary_of(place)["status"] == "interrupted"
    assert "stopped after step 5" in summary_of(place)["reason"]
    assert lmtune(place, "finetune", "run.yaml") == 0, said(place)
    assert "resumes after step 5" in said(place)
    assert lasting(place) == undisturbed


def nobody_reads() -> None:
    """What is written there has no reader any more, as after Ctrl-C at `lmtune … 2>&1 | tee log`."""
    reading, writing = os.pipe()
    os.close(reading)
    for descriptor in (1, 2):
        os.dup2(writing, descriptor)


def test_05_ctrl_c_that_also_ends_the_reader_of_its_output(place: Path, undisturbed: dict[str, Any]) -> None:
    trouble = at_step(5, all_of(nobody_reads, send(signal.SIGINT)))
    assert lmtune(place, "finetune", "run.yaml", trouble=trouble) == 130
    assert problem_of(place / "runs/trial/checkpoints/step-000005") is None
    assert summary_of(place)["status"] == "interrupted"
    assert lmtune(place, "finetune", "run.yaml") == 0, said(place)
    assert lasting(place) == undisturbed


def test_05_a_run_is_complete_though_nobody_reads_its_result(place: Path, undisturbed: dict[str, Any]) -> None:
    lmtune(place, "finetune", "run.yaml", trouble=at_step(5, nobody_reads))
    assert lasting(place) == undisturbed


def in_gradient(step: int, action: Trouble) -> Trouble:
    """`action` in the first micro-batch of `step`."""
    return at_step(step, at_call("lmtune.training.step", "_accumulate", action))


LATER = {
    "in the middle of the gradient": in_gradient(5, send(signal.SIGTERM)),
    "when the gradient is there": at_call("lmtune.training.loop", "update", send(signal.SIGTERM), 5),
    "when the step is recorded": at_call("lmtune.training.hooks", "CheckpointHook.after_step", send(signal.SIGTERM), 4),
}


@pytest.mark.parametrize("when", few(LATER, "in the middle of the gradient"))
def test_03_asked_at_any_moment_of_a_step_it_is_the_step_that_is_saved(place: Path, when: str) -> None:
    assert lmtune(place, "finetune", "run.yaml", trouble=LATER[when]) == 143
    assert "stopped after step 5 of 8, which is saved" in said(place)
    assert problem_of(place / "runs/trial/checkpoints/step-000005") is None


def test_03_a_stop_in_the_last_step_lets_it_finish(place: Path, undisturbed: dict[str, Any]) -> None:
    assert lmtune(place, "finetune", "run.yaml", trouble=at_step(8, send(signal.SIGTERM))) == 0
    assert lasting(place) == undisturbed


SECOND: dict[str, Trouble] = {
    "in the same step": at_step(5, all_of(send(signal.SIGTERM), send(signal.SIGTERM))),
    "while the summary is written": all_of(
        at_step(5, send(signal.SIGTERM)), at_call("lmtune.training.lifecycle", "_note_end", send(signal.SIGTERM))
    ),
}  # fmt: skip


def count_saves() -> None:
    """Note the step of each checkpoint that is asked for."""

    def noted(real: Any, folder: Path, checkpoint: Any) -> Any:
        with open("saves", "a", encoding="ascii") as file:
            file.write(f"{checkpoint.step}\n")
        return real(folder, checkpoint)

    wrap("lmtune.training.hooks", "save_checkpoint", noted)


@pytest.mark.parametrize("moment", SECOND)
def test_04_a_second_sigterm_changes_nothing(place: Path, undisturbed: dict[str, Any], moment: str) -> None:
    assert lmtune(place, "finetune", "run.yaml", trouble=all_of(count_saves, SECOND[moment])) == 143
    assert (place / "saves").read_text().split().count("5") == 1
    assert [name for name in checkpoints(place) if name >= "step-000005" or name.startswith(".")] == ["step-000005"]
    assert summary_of(place)["status"] == "interrupted"
    assert "stopped after step 5" in summary_of(place)["reason"]
    assert lmtune(place, "finetune", "run.yaml") == 0, said(place)
    assert lasting(place) == undisturbed
