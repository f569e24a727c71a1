"""Runs in which the model's own weights learn, from the command to every way to use the result."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lmtune
from lmtune.config.schema import ModelConfig
from lmtune.data.types import Message
from lmtune.errors import ConfigError
from lmtune.evaluation.evaluate import evaluate_loaded
from lmtune.export.merged import merge_run
from lmtune.export.uploads import prepare_push
from lmtune.inference.load import load_for_inference, usable_adapter
from lmtune.inference.request import Request, Sampling
from lmtune.inference.start_adapter import with_starting_adapter
from lmtune.models.base import load_model
from lmtune.runs.store import RunDirectory
from lmtune.training.checkpoint import load_checkpoint
from tests.processes import KILL, after_update
from tests.processes import lmtune as command
from tests.workplace import (
    config_of,
    finetune,
    inside,
    lasting,
    make_workplace,
    write_config,
    write_rows,
    written_files,
)

pytestmark = pytest.mark.slow  # a run each

TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "partial": {"kind": "partial", "parts": ["embeddings", "last_1_layers"]},
}  # fmt: skip
BESIDE: dict[str, dict[str, Any]] = {
    "modules_to_save": {"modules_to_save": ["head", "norm"], "lora_plus_ratio": 4.0},
    "new_tokens": {"new_tokens": ["<order>", "number"]},
}  # fmt: skip
RATE = {"train__learning_rate": 3e-3}
FILES = {
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "lmtune.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


def tuned_by(name: str) -> dict[str, Any]:
    """Changes of the workplace's settings."""
    return {f"tuning__{key}": value for key, value in {**TUNINGS, **BESIDE}[name].items()} | RATE


@pytest.fixture(scope="module", params=TUNINGS)
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunDirectory, str]:
    """A workplace with a run that has kept every checkpoint."""
    place = make_workplace(tmp_path_factory.mktemp("work"))
    run, _ = finetune(place, run__checkpoint_every_steps=1, run__keep_checkpoints=99, **tuned_by(request.param))
    return place, run, request.param


def test_the_result_is_a_plain_model_with_the_weights_of_the_last_step(done: tuple[Path, RunDirectory, str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, run, name = done
    assert set(written_files(run.merged)) == FILES
    assert not run.adapter.exists()
    plain, info = AutoModelForCausalLM.from_pretrained(run.merged, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    base = load_model(ModelConfig(name=str(place / "base"), quantization="none", dtype="float32"), "cpu")
    last = load_checkpoint(run.checkpoints / "step-000008").weights
    for key, parameter in plain.named_parameters():
        assert torch.equal(parameter, last.get(key, base.get_parameter(key)))
        assert torch.equal(parameter, base.get_parameter(key)) is (key not in last)
    assert (len(last) == len(list(plain.named_parameters()))) is (name == "full")
    assert AutoTokenizer.from_pretrained(run.merged).chat_template is not None


def test_it_scores_and_answers_as_the_run_said(done: tuple[Path, RunDirectory, str]) -> None:
    place, run, _ = done
    summary = json.loads(run.summary.read_text())
    with inside(place):
        loaded = load_for_inference("trial")
        scored = evaluate_loaded(loaded, ["validation.jsonl"], 3, 8, 128)
        assert load_for_inference("runs/trial/merged").run is not None
        with pytest.raises(ConfigError, match=r"--base: .* holds a whole model"):
            load_for_inference("trial", base="base")
        model = lmtune.load("trial")
    assert summary["tuned"]["loss"] < summary["base"]["loss"]
    assert scored.tuned.as_dict() == pytest.approx(summary["tuned"], abs=1e-5)
    assert scored.base is None
    assert not model.has_adapter
    assert loaded.name == "trial (base)"


def test_there_is_nothing_to_merge_and_it_can_be_put_elsewhere(done: tuple[Path, RunDirectory, str]) -> None:
    place, run, _ = done
    before = written_files(run.merged)
    with inside(place):
        merge_run(RunDirectory("runs/trial"), Path("runs/trial/merged"))
        assert written_files(run.merged) == before
        for _ in range(2):  # the second replaces the first
            merge_run(RunDirectory("runs/trial"), Path("elsewhere"))
        assert {
            name: text for name, text in written_files(place / "elsewhere").items() if name != "merge.json"
        } == before
        (place / "mine").mkdir()
        with pytest.raises(ConfigError, match="was not made by lmtune merge"):
            merge_run(RunDirectory("runs/trial"), Path("mine"))


def test_a_run_of_an_adapter_cannot_begin_from_it_but_over_it(done: tuple[Path, RunDirectory, str]) -> None:
    place, _, _ = done
    with inside(place), pytest.raises(ConfigError, match=r"to begin from it, set model\.name: runs/trial/merged"):
        with_starting_adapter(config_of(run__name="second", tuning__adapter="trial"))
    over, summary = finetune(place, run__name="over", model__name="runs/trial/merged", train__max_steps=2)
    assert summary["status"] == "complete"
    assert over.adapter.is_dir()


def test_what_is_pushed_is_the_model(done: tuple[Path, RunDirectory, str]) -> None:
    place, _, name = done
    with inside(place):
        upload = prepare_push(RunDirectory("runs/trial"), "me/whole")
    assert set(upload.sizes) == FILES
    assert "It is a whole model and needs no adapter" in upload.card
    assert f"- {name}\n" in upload.card


def test_an_unfinished_run_is_used_as_far_as_it_got(
    done: tuple[Path, RunDirectory, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, run, _ = done
    shutil.copytree(place, tmp_path / "work")
    run = RunDirectory(tmp_path / "work" / "runs" / "trial")
    shutil.rmtree(run.merged)
    for step in range(5, 9):
        shutil.rmtree(run.checkpoints / f"step-{step:06d}")
    run.summary.write_text(json.dumps({**json.loads(run.summary.read_text()), "status": "interrupted", "tuned": None}))
    capsys.readouterr()
    with inside(tmp_path / "work"):
        loaded = load_for_inference("trial").model
        merge_run(RunDirectory("runs/trial"), Path("four"))
        written = load_for_inference("four").model
    assert capsys.readouterr().err.count("runs/trial is not finished: uses step 4 of 8\n") == 2
    saved = load_checkpoint(run.checkpoints / "step-000004").weights
    for key, tensor in saved.items():
        assert torch.equal(loaded.get_parameter(key), tensor)
        assert torch.equal(written.get_parameter(key), tensor)


@pytest.mark.parametrize("name", [*TUNINGS, *BESIDE])
def test_a_killed_run_ends_bit_for_bit_like_one_that_was_not(tmp_path: Path, name: str) -> None:
    whole, killed = (make_workplace(tmp_path / part) for part in ("whole", "killed"))
    for place in (whole, killed):
        write_config(place, evaluation__every_steps=2, run__checkpoint_every_steps=2, **tuned_by(name))
    assert command(whole, "finetune", "run.yaml") == 0
    assert command(killed, "finetune", "run.yaml", trouble=after_update(5, KILL)) == -9
    assert command(killed, "finetune", "run.yaml") == 0
    assert lasting(killed) == lasting(whole)


@pytest.mark.parametrize(
    "name",
    [name if name in ("full", "new_tokens") else pytest.param(name, marks=pytest.mark.long)
     for name in (*TUNINGS, *BESIDE)],
)  # fmt: skip
def test_two_processes_give_what_one_gives(tmp_path: Path, name: str) -> None:
    place = make_workplace(tmp_path / "work")
    write_config(place, **tuned_by(name))
    assert command(place, "finetune", "run.yaml", "run.name=one") == 0
    assert command(place, "finetune", "run.yaml", "run.name=two", "--processes", "2") == 0
    file = "merged/model.safetensors" if name in TUNINGS else "adapter/adapter_model.safetensors"
    one, two = (load_file(place / "runs" / run / file) for run in ("one", "two"))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", BESIDE)
def test_what_is_trained_beside_an_adapter_is_chatted_resumed_merged_and_pushed(tmp_path: Path, name: str) -> None:
    place = make_workplace(tmp_path / "work")
    rows = [
        {"prompt": f"Where is <order> number {n}?", "completion": f"<order> number {n} is here."} for n in range(12)
    ]
    write_rows(place / "train.jsonl", rows)
    run, summary = finetune(place, run__checkpoint_every_steps=1, run__keep_checkpoints=99, **tuned_by(name))
    assert summary["tuned"]["loss"] < summary["base"]["loss"]
    with inside(place):
        loaded = load_for_inference("trial")
        scored = evaluate_loaded(loaded, ["validation.jsonl"], 3, 8, 128)
        prompt = loaded.renderer.prompt_ids([Message("user", "Where is <order> number 3?")])
        sampling = Sampling(max_new_tokens=4)
        base = list(loaded.engine.submit(Request(prompt, sampling, loaded.answering(use_base=True))))
        with loaded.use_base():
            assert [base] == loaded.engine.generate([Request(prompt, sampling)])
        report = merge_run(RunDirectory("runs/trial"), Path("whole"))
        merged = evaluate_loaded(load_for_inference("whole"), ["validation.jsonl"], 3, 8, 128)
        assert prepare_push(RunDirectory("runs/trial"), "me/adapter").sizes["adapter_model.safetensors"] > 0
        wanted = load_file(run.adapter / "adapter_model.safetensors")
        run.summary.write_text(json.dumps({**json.loads(run.summary.read_text()), "status": "interrupted"}))
        with usable_adapter(RunDirectory("runs/trial")) as adapter:
            found = load_file(adapter / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert scored.tuned.as_dict() == pytest.approx(summary["tuned"], abs=2e-5, rel=1e-5)
    assert scored.base is not None
    assert scored.base.as_dict() == pytest.approx(summary["base"], abs=2e-5, rel=1e-5)
    assert merged.tuned.as_dict() == pytest.approx(summary["tuned"], abs=2e-5, rel=1e-5)
    assert report["logits_difference"] < 1e-4
    for token in BESIDE[name].get("new_tokens", ()):
        index = loaded.tokenizer.convert_tokens_to_ids(token)
        assert index in prompt
        assert index in [i for ids in run.read_verification() for i in ids] or token == "<order>"


@pytest.mark.parametrize("name", ["partial", *BESIDE])
def test_it_is_trained_scored_and_asked_in_16_bit(tmp_path: Path, name: str) -> None:
    place = make_workplace(tmp_path / "work", dtype=torch.bfloat16)
    _, summary = finetune(place, model__dtype="bfloat16", evaluation__every_steps=4, **tuned_by(name))
    assert summary["tuned"]["loss"] < summary["base"]["loss"]
    assert summary["tuned"]["exact_match"] is not None
    with inside(place):
        scored = evaluate_loaded(load_for_inference("trial"), ["validation.jsonl"], 3, 8, 128).tuned
    assert scored.loss == pytest.approx(summary["tuned"]["loss"], rel=0.02)


def test_the_base_and_the_reference_are_the_weights_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a resumed run too: its checkpoint is restored after both were computed."""
    from lmtune.parallel.single import Single
    from lmtune.training.compose import compose

    place = make_workplace(tmp_path / "work")
    run, summary = finetune(place, **tuned_by("full"))
    with inside(place):
        parts = compose(config_of(**tuned_by("full")), Single())
        seen: list[bool] = []
        base = load_model(ModelConfig(name="base", quantization="none", dtype="float32"), "cpu")

        def precompute(data: Any, logprobs: Any) -> Any:
            weights = parts.model.trainable()
            seen.append(all(torch.equal(weights[key], base.get_parameter(key)) for key in weights))
            return data

        parts.objective.precompute = precompute  # type: ignore[method-assign]
        resumed = load_checkpoint(run.checkpoints / "step-000008")
        parts.job(resumed)
    assert seen == [True] * len(seen) != []
    key = "model.norm.weight"
    assert torch.equal(parts.model.trainable()[key], resumed.weights[key])
    assert summary["base"] is not None
    assert "for adapters" not in capsys.readouterr().err
    finetune(place, **{**tuned_by("full"), "train__learning_rate": 2e-4, "run__name": "other", "train__max_steps": 1})
    assert "train.learning_rate: 0.0002 is the default, for adapters" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(AssertionError, match="the base's own weights were trained"):
        parts.model.without_adapter()
