"""`model.dtype: auto`: bf16 where the device multiplies in it faster, fp32 elsewhere, and the same in a resumed run."""

import json
from pathlib import Path

import pytest
import torch

from lmtune.config.schema import ModelConfig
from lmtune.models import base, device
from lmtune.models.base import compute_dtype, describe_dtype, dtype_of, weight_sizes
from lmtune.models.device import bf16_speedup
from lmtune.runs.store import RunDirectory
from tests.tiny import save_tiny
from tests.workplace import finetune, make_workplace

CPU = torch.device("cpu")


@pytest.mark.parametrize(("speedup", "dtype"), [(2.4, torch.bfloat16), (1.2, torch.float32), (0.1, torch.float32)])
def test_the_faster_dtype_is_taken(speedup: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "bf16_speedup", lambda *_: speedup)
    model = ModelConfig(name="tiny")
    assert dtype_of(model, CPU) == dtype
    assert describe_dtype(model, CPU, dtype) == (
        f"{str(dtype)[6:]}: this CPU multiplies in bfloat16 {speedup} times as fast as in float32"
    )
    assert compute_dtype(CPU, "float32") == torch.float32
    assert describe_dtype(ModelConfig(name="tiny", dtype="float16"), CPU, torch.float16) == "float16: model.dtype"


def test_it_is_measured_by_products_of_the_models_own_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([4.0, 3.0, 5.0, 3.0, 2.0, 1.0, 2.0, 2.0])
    monkeypatch.setattr(device, "_seconds", lambda work: next(seconds) + 0 * work().numel())
    assert bf16_speedup(CPU, 512, 1024) == 3
    assert bf16_speedup(CPU, 512, 1024) == 3  # once in a process
    slow = iter([1.0] * 4 + [9.0] * 2)
    monkeypatch.setattr(device, "_seconds", lambda work: next(slow))
    assert bf16_speedup(CPU, 513, 1024) == pytest.approx(1 / 9)
    first = iter([1.0] * 4 + [9.0] + [0.5] * 3)  # where the first product makes its kernel
    monkeypatch.setattr(device, "_seconds", lambda work: next(first))
    assert bf16_speedup(CPU, 514, 1024) == 2
    assert weight_sizes(ModelConfig(name=str(save_tiny(tmp_path / "llama")))) == (64, 128)
    assert weight_sizes(ModelConfig(name=str(save_tiny(tmp_path / "gpt2", "gpt2")))) == (64, 256)
    assert weight_sizes(ModelConfig(name="nobody/nothing")) == (1024, 4096)


def test_a_small_model_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_seconds", None)
    model = ModelConfig(name="tiny")
    assert dtype_of(model, CPU) == torch.float32
    assert describe_dtype(model, CPU, torch.float32) == "float32: a small model gains nothing from 16 bit"


@pytest.mark.slow
@pytest.mark.parametrize("resumed", [True, False])
def test_a_resumed_run_computes_in_the_dtype_in_which_it_began(
    resumed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = make_workplace(tmp_path)
    with monkeypatch.context() as fast:
        fast.setattr(base, "bf16_speedup", lambda *_: 2.0)
        run, _ = finetune(place, train__max_steps=2)
    assert "precision: bfloat16: this CPU multiplies in bfloat16 2.0 times" in capsys.readouterr().err
    environment = json.loads(run.environment.read_text())
    assert environment["dtype"] == "bfloat16"
    finetune(place, train__max_steps=4, run__resume="auto" if resumed else "never")
    why = "bfloat16: as this run began" if resumed else "float32: a small model gains nothing from 16 bit"
    assert f"precision: {why}" in capsys.readouterr().err
    assert RunDirectory(run.path).trained_dtype() == ("bfloat16" if resumed else "float32")


def test_a_run_of_an_older_version_was_fp32_on_a_cpu(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.trained_dtype() is None
    run.environment.write_text('{"device": "CPU"}')
    assert run.trained_dtype() == "float32"
    run.environment.write_text('{"device": "some GPU"}')
    assert run.trained_dtype() is None
