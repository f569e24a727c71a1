"""A run that begins from an existing adapter: its weights and settings, what contradicts them, what is written down."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmtune.errors import CheckpointError, ConfigError, ModelError
from lmtune.evaluation.evaluate import evaluate_loaded
from lmtune.inference.load import load_for_inference
from lmtune.inference.start_adapter import starting_adapter, with_starting_adapter
from lmtune.runs.store import RunDirectory
from tests.workplace import config_of, finetune, inside, make_workplace

pytestmark = pytest.mark.slow  # runs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace with a finished run `trial` of rank 4 and alpha 8."""
    folder = make_workplace(tmp_path_factory.mktemp("start") / "work")
    finetune(folder)
    return folder


def weights(run: RunDirectory) -> dict[str, torch.Tensor]:
    """The final adapter's tensors."""
    return load_file(run.adapter / "adapter_model.safetensors")


# Rank and alpha of the first run are taken over where they are left at their default.
SECOND: dict[str, Any] = {"run__name": "second", "tuning__rank": 16, "tuning__alpha": 32, "tuning__adapter": "trial"}


def test_training_begins_from_it_and_says_so(place: Path) -> None:
    """With a rate of almost nothing it stays what it was."""
    run, summary = finetune(place, **SECOND, train__learning_rate=1e-12)
    first, second = weights(RunDirectory(place / "runs" / "trial")), weights(run)
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
    before = json.loads((place / "runs/trial/summary.json").read_text())
    assert summary["base"] == before["base"]  # of the base alone
    assert summary["tuned"]["loss"] == pytest.approx(before["tuned"]["loss"], abs=1e-5)
    assert summary["started_from"] == "trial"
    assert len(json.loads(run.environment.read_text())["starting_adapter_sha256"]) == 64
    assert "Training began from the adapter `trial`" in (run.adapter / "README.md").read_text()
    written = run.config.read_text()
    assert "rank: 4" in written
    assert "alpha: 8" in written
    assert "adapter: trial" in written
    lora = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (lora["r"], lora["lora_alpha"], lora["task_type"]) == (4, 8, "CAUSAL_LM")
    assert finetune(place, **SECOND, train__learning_rate=1e-12)[1] == summary  # complete already


@pytest.mark.parametrize(
    "changes", [{"tuning__adapter": "runs/trial/adapter"}, {"tuning__adapter": "trial", "tuning__dropout": 0.1}]
)
def test_it_learns_from_there(place: Path, changes: dict[str, Any]) -> None:
    _, summary = finetune(place, **{**SECOND, **changes}, run__resume="never", train__max_steps=4)
    before = json.loads((place / "runs/trial/summary.json").read_text())
    assert summary["tuned"]["loss"] < before["tuned"]["loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning__rank": 8}, r"tuning\.rank: 8; expected 4, as trial has it"),
        ({"tuning__alpha": 9}, r"tuning\.alpha: 9; expected 8"),
        ({"tuning__use_rslora": True}, r"tuning\.use_rslora: True; expected False"),
        ({"tuning__target_modules": ["q_proj"]}, r"tuning\.target_modules: \[q_proj\]; expected \[.*v_proj\]"),
        ({"tuning__adapter": "trail"}, "tuning.adapter: trail: no such run or adapter folder; did you mean trial?"),
        ({"run__name": "trial"}, "tuning.adapter: trial is this very run; to train on, raise train.epochs"),
    ],
)
def test_what_contradicts_it_is_refused_by_name(place: Path, changes: dict[str, Any], message: str) -> None:
    with inside(place), pytest.raises(ConfigError, match=message), starting_adapter(config_of(**{**SECOND, **changes})):
        pass


def test_a_plan_counts_the_adapter_that_it_begins_from(place: Path) -> None:
    with inside(place):
        found = with_starting_adapter(config_of(**SECOND)).tuning
    assert (found.rank, found.alpha) == (4, 8)
    assert with_starting_adapter(config_of()) == config_of()


def test_another_base_is_refused(place: Path, tmp_path: Path) -> None:
    other = make_workplace(tmp_path / "other")
    state = load_file(other / "base" / "model.safetensors")
    save_file(
        {name: tensor * 1.5 for name, tensor in state.items()}, other / "base" / "model.safetensors", {"format": "pt"}
    )
    shutil.copytree(place / "runs/trial/adapter", other / "first")
    with pytest.raises(ModelError, match="this adapter was trained over another base model"):
        finetune(other, **{**SECOND, "tuning__adapter": "first"})


def test_a_run_goes_on_only_from_the_same_adapter(place: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    shutil.copytree(place / "runs/trial/adapter", first)
    settings = {**SECOND, "tuning__adapter": str(first), "run__name": "third"}
    run, _ = finetune(place, **settings, run__checkpoint_every_steps=1, run__keep_checkpoints=99)
    assert str(tmp_path) not in run.config.read_text()
    first.rename(tmp_path / "moved")
    moved = {**settings, "tuning__adapter": str(tmp_path / "moved")}
    finetune(place, **moved)  # where it lies is not what it is
    file = tmp_path / "moved" / "adapter_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="the starting adapter's weights: changed"):
        finetune(place, **moved)


def test_scoring_compares_with_the_adapter_that_training_began_from(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = place / "pairs.jsonl"
    rows = [{"prompt": f"Say {n}!", "chosen": f"It is {n}.", "rejected": "No."} for n in range(8)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(place / "runs/trial/adapter", first := tmp_path / "first")
    for name, begun_from in (("apart", str(first)), ("new", None)):
        given = {**SECOND, "run__name": name, "tuning__adapter": begun_from}
        run, summary = finetune(
            place, **given, objective__kind="dpo", data__train=str(pairs), data__validation=str(pairs),
            train__max_steps=2,
        )  # fmt: skip
        capsys.readouterr()
        loaded = load_for_inference(str(run.path))
        before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
        with inside(place):
            found = evaluate_loaded(loaded, [str(pairs)], 0, 1, 64)
        assert found.base is not None
        for scores, known in ((found.tuned, summary["tuned"]), (found.base, summary["base"])):
            assert scores.loss == pytest.approx(known["loss"], abs=1e-5)
            assert scores.metrics["reward_chosen"] == pytest.approx(known["reward_chosen"], abs=1e-5)
        assert (found.base.metrics["reward_chosen"] == 0) is (begun_from is None)
        assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())
        assert "cannot be used" not in capsys.readouterr().err
    shutil.rmtree(first)
    with inside(place):
        evaluate_loaded(load_for_inference("apart"), [str(pairs)], 0, 1, 64)
    assert "cannot be used" in " ".join(capsys.readouterr().err.split())
