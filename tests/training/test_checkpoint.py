"""Checkpoints: whole or absent, checked before they are used, and never the reason why an earlier one is lost."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lmtune.errors import CheckpointError
from lmtune.training.checkpoint import (
    Checkpoint,
    CheckpointState,
    load_checkpoint,
    newest_checkpoint,
    optimizer_tensors,
    prune_checkpoints,
    restore,
    save_checkpoint,
)
from lmtune.training.state import RunSignature, TrainState


def state(step: int) -> Checkpoint:
    """A checkpoint whose tensors depend on the step."""
    generator = torch.Generator().manual_seed(step)
    adapter = {name: torch.randn(4, 8, generator=generator) for name in ("a.lora_A", "a.lora_B")}
    moments = {f"{kind}.{name}": t * 2 for kind in ("exp_avg", "exp_avg_sq") for name, t in adapter.items()}
    signature = RunSignature({"data.system": "ä"}, "rows", "base")
    return Checkpoint(adapter, moments, CheckpointState(TrainState(step), signature, step, "auto"))


def saved(folder: Path, *steps: int) -> None:
    """Checkpoints of these steps."""
    for step in steps:
        save_checkpoint(folder, state(step))


def names(folder: Path) -> list[str]:
    """What lies in a folder."""
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "checkpoints", state(100))
    assert path.name == "step-000100"
    assert names(path) == ["adapter_model.safetensors", "manifest.json", "optimizer.safetensors", "state.json"]
    loaded, wanted = load_checkpoint(path), state(100)
    assert (loaded.step, loaded.state) == (100, wanted.state)
    for found, expected in ((loaded.weights, wanted.weights), (loaded.optimizer, wanted.optimizer)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_newest_is_by_number_not_by_name(tmp_path: Path) -> None:
    saved(tmp_path, 999_999, 1_000_000)
    (tmp_path / "step-notes").mkdir()
    newest, skipped = newest_checkpoint(tmp_path)
    assert newest is not None
    assert (newest.step, skipped) == (1_000_000, [])


def flip_a_bit(path: Path) -> None:
    """Damage one byte in the middle; the size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda path: (path / "adapter_model.safetensors").write_bytes(b"x" * 10),
        "adapter_model.safetensors is not what was written",
    ),
    "flipped bit": (lambda path: flip_a_bit(path / "optimizer.safetensors"), "optimizer.safetensors is not what was"),
    "other state": (lambda path: flip_a_bit(path / "state.json"), "state.json is not what was written"),
    "missing file": (lambda path: (path / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
    "missing manifest": (lambda path: (path / "manifest.json").unlink(), "no manifest.json"),
    "half a manifest": (lambda path: (path / "manifest.json").write_text('{"a'), "manifest.json is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_and_said(tmp_path: Path, kind: str) -> None:
    saved(tmp_path, 1, 2, 3)
    damage, message = DAMAGE[kind]
    damage(tmp_path / "step-000003")
    newest, skipped = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 2
    assert len(skipped) == 1
    assert skipped[0].startswith(f"step-000003: {message}")


def test_a_damaged_one_is_written_again(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    flip_a_bit(tmp_path / "step-000001" / "optimizer.safetensors")
    saved(tmp_path, 1)
    assert newest_checkpoint(tmp_path)[1] == []


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, 4, 5)
    prune_checkpoints(tmp_path, keep=2, best_step=2, written=5)
    assert names(tmp_path) == ["step-000002", "step-000004", "step-000005"]
    for _ in range(2):
        prune_checkpoints(tmp_path, keep=1, best_step=None, written=5)
        assert names(tmp_path) == ["step-000005"]


def test_a_later_one_that_was_passed_over_does_not_count_when_pruning(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 8)
    flip_a_bit(tmp_path / "step-000008" / "state.json")
    saved(tmp_path, 3)  # resumed from step 2
    prune_checkpoints(tmp_path, keep=1, best_step=None, written=3)
    newest, _ = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 3


def trained() -> tuple[dict[str, torch.nn.Parameter], torch.optim.AdamW]:
    """Two parameters after three steps of AdamW."""
    torch.manual_seed(0)
    parameters = {name: torch.nn.Parameter(torch.randn(3, 2)) for name in ("a", "b")}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        one_step(parameters, optimizer)
    return parameters, optimizer


def one_step(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.AdamW) -> None:
    """A step on a loss that is not symmetric."""
    optimizer.zero_grad()
    sum((parameter**3).sum() for parameter in parameters.values()).backward()  # type: ignore[union-attr]
    optimizer.step()


def test_a_restored_optimizer_goes_on_bit_for_bit(tmp_path: Path) -> None:
    parameters, optimizer = trained()
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    path = save_checkpoint(tmp_path, Checkpoint(weights, optimizer_tensors(optimizer, parameters), state(3).state))
    fresh = {name: torch.nn.Parameter(torch.zeros(3, 2)) for name in parameters}
    again = torch.optim.AdamW(fresh.values(), lr=0.1, weight_decay=0.1)
    restore(load_checkpoint(path), again, fresh)
    for _ in range(2):
        one_step(parameters, optimizer)
        one_step(fresh, again)
    assert all(torch.equal(fresh[name], parameter) for name, parameter in parameters.items())


@pytest.mark.parametrize("fused", [True, False])
def test_what_is_restored_is_where_the_optimizer_looks_for_it(fused: bool) -> None:
    """The fused kernel reads `step` through a pointer of the parameter's device; without it a GPU reads host memory."""
    parameters, optimizer = trained()
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    checkpoint = Checkpoint(weights, optimizer_tensors(optimizer, parameters), state(3).state)
    elsewhere = {name: torch.nn.Parameter(torch.zeros(3, 2, device="meta")) for name in parameters}
    again = torch.optim.AdamW(elsewhere.values())
    again.param_groups[0]["fused"] = fused  # the constructor asks for a device that has such a kernel
    restore(checkpoint, again, elsewhere)
    for parameter in elsewhere.values():
        devices = {name: value.device.type for name, value in again.state[parameter].items()}
        assert devices == {"step": "meta" if fused else "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}


@pytest.mark.gpu
def test_a_run_on_a_gpu_goes_on_bit_for_bit() -> None:
    def new(fill: float) -> tuple[dict[str, torch.nn.Parameter], torch.optim.AdamW]:
        parameters = {name: torch.nn.Parameter(torch.full((3, 2), fill, device="cuda")) for name in ("a", "b")}
        return parameters, torch.optim.AdamW(parameters.values(), lr=0.1, fused=True)

    parameters, optimizer = new(1.0)
    one_step(parameters, optimizer)
    weights = {name: parameter.detach().cpu() for name, parameter in parameters.items()}
    checkpoint = Checkpoint(weights, optimizer_tensors(optimizer, parameters), state(1).state)
    fresh, again = new(0.0)
    restore(checkpoint, again, fresh)
    one_step(parameters, optimizer)
    one_step(fresh, again)
    assert all(torch.equal(fresh[name], parameter) for name, parameter in parameters.items())


@pytest.mark.parametrize("shapes", [{"a": (3, 2), "b": (2, 3)}, {"a": (3, 2), "c": (3, 2)}])
def test_another_adapter_is_refused(shapes: dict[str, tuple[int, int]]) -> None:
    parameters, optimizer = trained()
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    other = {name: torch.nn.Parameter(torch.zeros(*shape)) for name, shape in shapes.items()}
    checkpoint = Checkpoint(weights, optimizer_tensors(optimizer, parameters), state(3).state)
    with pytest.raises(CheckpointError, match="other tensors than this model"):
        restore(checkpoint, torch.optim.AdamW(other.values()), other)
