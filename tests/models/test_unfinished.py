"""A run that was stopped, has failed or still trains can be talked to and merged: a checkpoint's adapter is used."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lmtune.errors import ModelError
from lmtune.export.merged import merge_run
from lmtune.inference.load import load_for_inference, newest_saved, usable_adapter
from lmtune.runs.store import RunDirectory
from lmtune.training.checkpoint import checkpoint_folders
from tests.workplace import finetune, inside, make_workplace, written_files

pytestmark = pytest.mark.slow  # a run each

VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"tuning__use_dora": True}, "pissa": {"tuning__init_lora_weights": "pissa"},
    "nf4": {"model__quantization": "nf4", "tuning__target_modules": ["q_proj", "down_proj"]},
}  # fmt: skip


def place_of(folder: Path, **changes: Any) -> tuple[Path, RunDirectory]:
    """A workplace with a finished run that has kept every checkpoint."""
    place = make_workplace(folder)
    run, _ = finetune(place, run__checkpoint_every_steps=1, run__keep_checkpoints=99, **changes)
    return place, run


def interrupt(run: RunDirectory, step: int) -> None:
    """As if the run had been stopped after `step`."""
    for path in checkpoint_folders(run.checkpoints):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    run.summary.write_text(json.dumps({**json.loads(run.summary.read_text()), "status": "interrupted", "tuned": None}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoints_adapter_is_what_the_run_would_have_saved(tmp_path: Path, variant: str) -> None:
    place, run = place_of(tmp_path / "work", **VARIANTS[variant])
    wanted = load_file(run.adapter / "adapter_model.safetensors")
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    interrupt(run, 8)
    before = written_files(run.path)
    with inside(place), usable_adapter(RunDirectory("runs/trial")) as adapter:
        found = load_file(adapter / "adapter_model.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)
        assert json.loads((adapter / "adapter_config.json").read_text()) == config
        assert (adapter / "lmtune.json").read_bytes() == (run.adapter / "lmtune.json").read_bytes()
    assert not adapter.exists()
    assert written_files(run.path) == before


def test_an_unfinished_run_is_used_as_far_as_it_got(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, run = place_of(tmp_path / "work")
    interrupt(run, 4)
    shutil.rmtree(run.adapter)
    saved = newest_saved(RunDirectory(run.path))
    assert saved is not None
    capsys.readouterr()
    with inside(place), RunDirectory("runs/trial").locked():  # it still trains
        loaded = load_for_inference("trial")
        report = merge_run(RunDirectory("runs/trial"), Path("merged"), "trained")
        assert load_for_inference("merged").model is not None
    assert report["rows"] > 0
    assert capsys.readouterr().err.count("runs/trial is not finished: uses step 4 of 8\n") == 2
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_B.default.weight"
    assert torch.equal(dict(loaded.model.named_parameters())[name], saved.weights[name])
    assert "merge" not in json.loads(run.summary.read_text())
    assert not run.adapter.exists()


def test_the_best_checkpoint_or_the_newest_that_is_whole(tmp_path: Path) -> None:
    place, run = place_of(tmp_path / "work", evaluation__every_steps=2, train__learning_rate=10.0)
    with inside(place):
        interrupt(run, 7)
        state = json.loads((run.checkpoints / "step-000007" / "state.json").read_text())
        best, saved = state["counters"]["best_step"], newest_saved(run)
        assert saved is not None
        assert best < 7
        assert str(saved) == f"step {best} of 8, the best so far by its validation loss"
        shutil.rmtree(run.checkpoints / f"step-{best:06d}")
        (run.checkpoints / "step-000007" / "adapter_model.safetensors").write_bytes(b"damaged")
        saved = newest_saved(run)
        assert saved is not None
        left = sorted(path for path in run.checkpoints.glob("step-*") if path.name != "step-000007")
        best = json.loads((left[-1] / "state.json").read_text())["counters"]["best_step"]
        is_there = (run.checkpoints / f"step-{best:06d}").is_dir()
        wanted = (
            f"step {best} of 8, the best so far by its validation loss"
            if is_there
            else f"step {left[-1].name[-1]} of 8"
        )
        assert str(saved) == wanted


def test_without_adapter_and_checkpoint_it_says_how_to_finish(tmp_path: Path) -> None:
    place, run = place_of(tmp_path / "work")
    interrupt(run, 0)
    shutil.rmtree(run.adapter)
    with inside(place), pytest.raises(ModelError, match="this run has no adapter yet; finish it with the same"):
        load_for_inference("trial")
