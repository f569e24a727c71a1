"""Whether a run may resume: settings that decide the result must stay, speed and reporting are free."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lmtune.config.schema import DataConfig, FinetuneConfig, ModelConfig
from lmtune.errors import CheckpointError
from lmtune.runs.store import RunDirectory, checkpoint_folders
from lmtune.training.resume import check_resumable
from lmtune.training.state import RunSignature, TrainState
from tests.workplace import config_of, finetune, make_workplace

pytestmark = pytest.mark.slow  # seconds together; left out of `make test-fast`

FREE = {
    "model__offload": "layers", "model__resident_layers": 4,
    "train__micro_batch_tokens": 64, "train__gradient_checkpointing": True, "evaluation__exact_match_rows": 2,
    "evaluation__max_new_tokens": 4, "run__checkpoint_every_steps": 7, "run__keep_checkpoints": 5,
}  # fmt: skip
BINDING = {
    "model__name": "other", "model__quantization": "nf4", "model__dtype": "float32", "tuning__rank": 8,
    "tuning__alpha": 9, "tuning__dropout": 0.1, "tuning__target_modules": ("q_proj",), "tuning__use_rslora": True,
    "tuning__use_dora": True, "data__max_length": 64, "data__too_long": "error", "data__system": "Be brief.",
    "data__template": "chat", "train__batch_size": 8, "train__seed": 1,
    "train__learning_rate": 2e-2, "train__schedule": "linear", "train__warmup_ratio": 0.5,
    "train__weight_decay": 0.1, "train__max_grad_norm": None, "evaluation__every_steps": 2,
}  # fmt: skip


def signature_of(**changes: Any) -> RunSignature:
    """What must be equal, with the same data and base."""
    return RunSignature.of(config_of(**changes), "data", "base")


def test_a_checkpoint_of_an_earlier_version_has_todays_names() -> None:
    signature = RunSignature.from_dict({
        "adapter.rank": 4, "adapter.method": "lora", "the data files' content": "d", "the base model's weights": "b"
    })  # fmt: skip
    assert signature.settings == {"tuning.rank": 4, "tuning.kind": "lora"}
    assert TrainState.from_dict({"step": 3, "counter_of_tomorrow": 1}).step == 3


@pytest.mark.parametrize("key", FREE)
def test_settings_of_speed_and_reporting_are_free(key: str) -> None:
    assert signature_of(**{key: FREE[key]}) == signature_of()


@pytest.mark.parametrize("key", BINDING)
def test_settings_that_decide_the_result_are_not(key: str) -> None:
    name = key.replace("__", ".")
    before, now = signature_of(), signature_of(**{key: BINDING[key]})
    with pytest.raises(CheckpointError, match="cannot resume: settings changed") as caught:
        check_resumable(RunDirectory("runs/trial"), before, now)
    assert f"  {name}: was {before.settings[name]!r}, now {now.settings[name]!r}\n" in str(caught.value)
    assert str(caught.value).count(": was ") == 1


def test_all_differences_stand_in_one_message() -> None:
    now = replace(signature_of(train__seed=1, tuning__rank=8), data="x")
    with pytest.raises(CheckpointError) as caught:
        check_resumable(RunDirectory("runs/trial"), signature_of(), now)
    lines = str(caught.value).splitlines()
    assert lines[0] == "runs/trial: cannot resume: settings changed since this run started"
    assert lines[1:4] == [
        "  train.seed: was 0, now 1", "  tuning.rank: was 4, now 8", "  the data files' content: changed"
    ]  # fmt: skip
    assert "run.resume=never" in lines[4]


def test_a_signature_survives_being_written(tmp_path: Path) -> None:
    """A tuple becomes a list in JSON; that is no difference."""
    now = replace(signature_of(tuning__target_modules=("q_proj", "v_proj")), tokens="t", start="s")
    assert RunSignature.from_dict(json.loads(json.dumps(now.to_dict()))) == now


@pytest.mark.parametrize("key", [key for key in BINDING if not key.startswith("model__")])
def test_a_setting_that_is_new_in_this_version_counts_as_its_default(key: str) -> None:
    """A run of a version that did not know the setting did what the default keeps."""
    name = key.replace("__", ".")
    section, _, field = name.partition(".")
    default = getattr(getattr(FinetuneConfig(model=ModelConfig(name="x"), data=DataConfig(train="x")), section), field)
    whole = signature_of()
    before = replace(whole, settings={k: v for k, v in whole.settings.items() if k != name})
    check_resumable(RunDirectory("x"), before, signature_of(**{key: default}))
    with pytest.raises(CheckpointError, match=rf"{name}: was .*, now "):
        check_resumable(RunDirectory("x"), before, signature_of(**{key: BINDING[key]}))


def test_rows_count_by_their_tokens_where_both_runs_know_them() -> None:
    def of(key: str, tokens: str | None) -> RunSignature:
        return RunSignature.of(config_of(), key, "base", tokens)

    check_resumable(RunDirectory("x"), of("by transformers 5.23.0", "same"), of("by transformers 5.23.1", "same"))
    with pytest.raises(CheckpointError, match="the data files' content: changed"):
        check_resumable(RunDirectory("x"), of("same", "tokens"), of("same", "others"))


# --- through the recipe


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A workplace of its own."""
    return make_workplace(tmp_path / "work")


def cut_off(folder: Path, step: int, **changes: Any) -> RunDirectory:
    """A run as if killed just after the checkpoint of `step`."""
    run, _ = finetune(folder, run__checkpoint_every_steps=1, run__keep_checkpoints=99, **changes)
    for path in checkpoint_folders(run.checkpoints):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    summary = json.loads(run.summary.read_text())
    run.summary.write_text(json.dumps({**summary, "status": "running", "tuned": None}))
    shutil.rmtree(run.adapter)
    return run


def adapter_of(run: RunDirectory) -> bytes:
    """The final adapter's file."""
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def steps_of(run: RunDirectory) -> list[dict[str, Any]]:
    """The metrics, but for times."""
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def times(run: RunDirectory) -> dict[str, int]:
    """When each file was written; the lock is taken by every start."""
    files = [path for path in run.path.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): path.stat().st_mtime_ns for path in files}


def test_a_run_that_is_complete_is_left_alone(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, summary = finetune(place)
    before = times(run)
    _, again = finetune(place)
    assert again == summary
    assert "is complete already; give run.name=" in capfd.readouterr().err
    assert times(run) == before


CONSTANT: dict[str, Any] = {"train__schedule": "constant", "train__warmup_ratio": 0.0}


@pytest.mark.parametrize("unfinished", [False, True])
def test_a_run_is_trained_on_with_more_steps(place: Path, capfd: pytest.CaptureFixture[str], unfinished: bool) -> None:
    """With a rate that does not depend on their number, it ends as a run that had them from the start."""
    straight, _ = finetune(place, run__name="straight", train__max_steps=12, **CONSTANT)
    run = cut_off(place, 5, **CONSTANT) if unfinished else finetune(place, **CONSTANT)[0]
    merged = adapter_of(run) if not unfinished else b""
    capfd.readouterr()
    _, summary = finetune(place, train__max_steps=12, **CONSTANT)
    said = capfd.readouterr().err
    assert f"resumes after step {5 if unfinished else 8}" in said
    start = 6 if unfinished else 9
    assert f"8 steps become 12: from step {start} on the learning rate is that of train.schedule=constant" in said
    assert (summary["status"], summary["steps"]) == ("complete", 12)
    assert adapter_of(run) == adapter_of(straight) != merged
    assert steps_of(run) == steps_of(straight)


def test_sources_with_shares_are_taken_as_said_and_resumed_bit_for_bit(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Eight rows of the CSV file for 24 of the other one in each epoch, also after the run was cut off."""
    lines = [f"What is letter {n}?;It is {n % 7}." for n in range(40)]
    (place / "more.csv").write_text("\n".join(["Frage;Antwort", *lines]) + "\n")
    sources = {
        "data__train": [{"path": "train.jsonl", "share": 0.75}, {"path": "more.csv", "share": 0.25}],
        "data__columns": {"Frage": "prompt", "Antwort": "completion"}, "train__max_steps": 14, "train__batch_size": 5,
    }  # fmt: skip
    straight, summary = finetune(place, run__name="straight", **sources)
    assert "an epoch has 32 examples, in which the shares hold" in capfd.readouterr().err
    told = json.loads(straight.data.read_text())
    assert told["sources"] == [
        {"path": "train.jsonl", "rows": 24, "examples_per_epoch": 24, "share": 0.75},
        {"path": "more.csv", "rows": 40, "examples_per_epoch": 8, "share": 0.25},
    ]
    assert told["train"]["read_as"] == {"more.csv": 'delimiter ";", columns Frage → prompt, Antwort → completion'}
    run = cut_off(place, 9, **sources)  # in the second epoch of seven steps
    finetune(place, **sources)
    assert adapter_of(run) == adapter_of(straight)
    assert steps_of(run) == steps_of(straight)
    assert summary["steps"] == 14
    turned = [{"path": "train.jsonl", "share": 0.5}, {"path": "more.csv", "share": 0.5}]
    with pytest.raises(CheckpointError, match="cannot resume"):
        finetune(place, **{**sources, "data__train": turned, "train__max_steps": 20})


def test_fewer_steps_than_are_done_are_refused_by_name(place: Path) -> None:
    run, _ = finetune(place)
    before = times(run)
    with pytest.raises(CheckpointError, match=r"train\.max_steps: 5 makes 5 steps, and 8 are done; raise it to 8"):
        finetune(place, train__max_steps=5)
    with pytest.raises(CheckpointError, match=r"train\.epochs: 1 makes 6 steps, and 8 are done; raise it to 2 "):
        finetune(place, train__max_steps=None, train__epochs=1)
    assert times(run) == before


def test_fewer_steps_than_were_planned_end_an_unfinished_run_earlier(place: Path) -> None:
    cut_off(place, 4)
    _, summary = finetune(place, train__max_steps=6)
    assert (summary["status"], summary["steps"]) == ("complete", 6)


def test_a_run_whose_checkpoints_are_gone_cannot_be_trained_on(place: Path) -> None:
    run, _ = finetune(place)
    shutil.rmtree(run.checkpoints)
    before = times(run)
    with pytest.raises(CheckpointError, match=r"checkpoints: no checkpoint; 12 steps instead of 8 must resume"):
        finetune(place, train__max_steps=12)
    assert times(run) == before


def test_data_that_moved_is_the_same_data(place: Path) -> None:
    run = cut_off(place, 3)
    (place / "train.jsonl").rename(place / "renamed.jsonl")
    _, summary = finetune(place, data__train="renamed.jsonl")
    assert summary["status"] == "complete"
    assert run.adapter.is_dir()


def test_free_settings_may_change_in_the_middle_and_take_effect(place: Path) -> None:
    run = cut_off(place, 4)
    _, summary = finetune(place, **FREE)
    assert summary["status"] == "complete"
    assert summary["micro_batch_tokens"] == 64
    assert summary["tuned"]["exact_match_rows"] == summary["base"]["exact_match_rows"] == 2
    answers = [json.loads(line) for line in run.predictions.read_text().splitlines()]
    assert [sorted(answer) for answer in answers] == [["base", "question", "reference", "tuned"]] * 2


def test_a_halved_micro_batch_stays_halved_if_the_setting_is_the_same(place: Path) -> None:
    run = cut_off(place, 4)
    path = run.checkpoints / "step-000004"
    state = json.loads((path / "state.json").read_text())
    state["counters"]["micro_batch_tokens"] = 77  # as after running out of memory
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text())
    content = (path / "state.json").read_bytes()
    manifest["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert finetune(place)[1]["micro_batch_tokens"] == 77


def test_a_run_that_patience_ended_ends_there_after_a_crash_too(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Killed between the last checkpoint and the summary."""
    changes = {"evaluation__every_steps": 1, "evaluation__patience": 1, "train__learning_rate": 10.0}
    whole, summary = finetune(place, run__name="whole", **changes)
    assert summary["stopped_early"]
    assert summary["steps"] < 8
    told = "stopped early: 1 evaluation in a row without a better loss"
    assert f"{told} than at step {summary['best_step']}" in capfd.readouterr().err
    assert told in whole.events.read_text().splitlines()[-1]
    run = cut_off(place, summary["steps"], **changes)
    _, again = finetune(place, run__checkpoint_every_steps=1, run__keep_checkpoints=99, **changes)
    assert (again["steps"], again["stopped_early"], again["best_step"]) == (
        summary["steps"], True, summary["best_step"]
    )  # fmt: skip
    assert adapter_of(run) == adapter_of(whole)


def test_a_best_step_that_is_damaged_is_said_and_the_last_one_kept(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = {"evaluation__every_steps": 1, "evaluation__patience": 1, "train__learning_rate": 10.0}
    _, summary = finetune(place, run__name="whole", **changes)
    best, last = summary["best_step"], summary["steps"]
    assert best < last
    run = cut_off(place, last, **changes)
    file = run.checkpoints / f"step-{best:06d}" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    _, again = finetune(place, **changes)
    assert f"the checkpoint of the best step, step-{best:06d}, is damaged" in capfd.readouterr().err
    assert (again["status"], again["best_step"]) == ("complete", None)
    kept = load_file(run.adapter / "adapter_model.safetensors")
    state = load_file(run.checkpoints / f"step-{last:06d}" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name.replace(".default", "")], tensor) for name, tensor in state.items())


def test_beginning_again_sets_the_earlier_run_aside(place: Path) -> None:
    run, _ = finetune(place)
    before = adapter_of(run)
    finetune(place, run__resume="never", train__seed=1)
    assert (run.path.with_name("trial-old-1") / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert adapter_of(run) != before
    finetune(place, train__seed=1)  # the new run is whole and can be asked for again


def test_a_finished_run_without_checkpoints_is_not_trained_again(place: Path) -> None:
    """Checkpoints may be deleted to save room; the adapter is what was wanted."""
    run, summary = finetune(place)
    shutil.rmtree(run.checkpoints)
    before = adapter_of(run)
    assert finetune(place)[1] == summary
    assert adapter_of(run) == before
    with pytest.raises(CheckpointError, match=r"train\.seed: was 0, now 1"):
        finetune(place, train__seed=1)
    assert load_file(run.adapter / "adapter_model.safetensors")
