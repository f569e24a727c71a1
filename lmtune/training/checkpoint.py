"""Checkpoints: written beside their place, complete, checksummed, and only then given their name.

    checkpoints/step-000100/   adapter_model.safetensors  optimizer.safetensors  state.json  manifest.json

A checkpoint is what is trained, AdamW's two moments for each, and a small JSON; data order, dropout and the
learning rate follow from the step, so nothing else is needed to resume bit for bit. The manifest (sizes, SHA-256) is
written last: a folder without one that matches is not a checkpoint. No pickle anywhere.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from lmtune.errors import CheckpointError, LmtuneError
from lmtune.io.atomic import parse_object, staged_folder
from lmtune.io.text import format_list
from lmtune.models.tuning.base import Tensors
from lmtune.runs.store import ADAPTER, MANIFEST, OPTIMIZER, STATE, checkpoint_folders, fingerprint, problem_of, step_of
from lmtune.training.state import RunSignature, TrainState


@dataclass(frozen=True)
class CheckpointState:
    """`state.json` of a checkpoint."""

    train: TrainState
    signature: RunSignature
    total_steps: int
    micro_batch_setting: int | Literal["auto"]  # `train.micro_batch_tokens` as it was asked for

    def to_dict(self) -> dict[str, object]:
        """As JSON."""
        return {
            "step": self.train.step, "counters": asdict(self.train), "identity": self.signature.to_dict(),
            "total_steps": self.total_steps, "micro_batch_setting": self.micro_batch_setting,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, tree: Any) -> CheckpointState:
        """From JSON."""
        return cls(
            TrainState.from_dict(tree["counters"]), RunSignature.from_dict(tree["identity"]), tree["total_steps"],
            tree["micro_batch_setting"],
        )  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on."""

    weights: Tensors  # what is trained, by name
    optimizer: Tensors  # by kind and name: AdamW's `exp_avg.NAME` and `exp_avg_sq.NAME`
    state: CheckpointState

    @property
    def step(self) -> int:
        """The last finished step."""
        return self.state.train.step


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `folder/step-NNNNNN`, whole or not at all; one that is there and whole is left.

    LmtuneError if the disk is full or refuses to be written; earlier checkpoints are untouched.
    """
    target = folder / f"step-{checkpoint.step:06d}"
    if target.exists() and not problem_of(target):
        return target
    try:
        with staged_folder(target, folder / f".staging-{target.name}") as staging:
            save_file(dict(checkpoint.weights), staging / ADAPTER, metadata={"format": "pt"})
            save_file(dict(checkpoint.optimizer), staging / OPTIMIZER, metadata={"format": "pt"})
            state = json.dumps(checkpoint.state.to_dict(), indent=2, allow_nan=False)
            (staging / STATE).write_text(state, encoding="utf-8")
            manifest = {name: fingerprint(staging / name) for name in (ADAPTER, OPTIMIZER, STATE)}
            (staging / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    except Exception as error:
        reason = getattr(error, "strerror", None) or error
        raise LmtuneError(
            f"cannot write the checkpoint {target}: {reason}; make room or permit writing, then start the same command "
            "again: it resumes from the checkpoint before"
        ) from error
    return target


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and what was wrong with newer ones; CheckpointError if all are damaged."""
    skipped: list[str] = []
    for path in reversed(checkpoint_folders(folder)):
        problem = problem_of(path)
        if problem is None:
            return load_checkpoint(path), skipped
        skipped.append(f"{path.name}: {problem}")
    if skipped:
        raise CheckpointError(
            f"{folder}: every checkpoint is damaged\n{format_list(skipped)}\n"
            "  restore one from a copy, or begin again with run.resume=never"
        )
    return None, skipped


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint folder, whose manifest was checked."""
    state = CheckpointState.from_dict(parse_object((path / STATE).read_bytes()))
    return Checkpoint(load_file(path / ADAPTER), load_file(path / OPTIMIZER), state)


def prune_checkpoints(folder: Path, keep: int, best_step: int | None, written: int) -> None:
    """Delete all but the newest `keep` checkpoints up to step `written`, the last one, and that of `best_step`.

    A later one was damaged and passed over on resuming, so it must not count as one of those to keep.
    """
    for path in [path for path in checkpoint_folders(folder) if step_of(path) <= written][:-keep]:
        if step_of(path) != best_step:
            shutil.rmtree(path)


_DERIVED = ("step", "qmap1", "qmap2")  # of an optimizer's state: the run's step, and constants of 8-bit AdamW


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]) -> Tensors:
    """The optimizer's tensors, AdamW's moments as `exp_avg.NAME` and `exp_avg_sq.NAME`."""
    return {
        f"{kind}.{name}": tensor.detach().contiguous().cpu()
        for name, parameter in parameters.items()
        for kind, tensor in optimizer.state[parameter].items()
        if kind not in _DERIVED
    }


def restore(
    checkpoint: Checkpoint, optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> None:
    """Put a checkpoint's tensors into the model and the optimizer; CheckpointError if they do not fit."""
    wanted = {name: parameter.shape for name, parameter in parameters.items()}
    if wanted != {name: tensor.shape for name, tensor in checkpoint.weights.items()}:
        raise CheckpointError("the checkpoint has other tensors than this model; see tuning and model.name")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(checkpoint.weights[name])
    names = {id(parameter): name for name, parameter in parameters.items()}
    saved: dict[str, dict[str, torch.Tensor]] = {name: {} for name in parameters}
    for key, tensor in checkpoint.optimizer.items():
        kind, _, name = key.partition(".")
        saved[name][kind] = tensor
    # as an optimizer counts parameters: through its groups, not through the model
    places = [
        (names[id(parameter)], parameter, group, number, index)
        for number, group in enumerate(optimizer.param_groups)
        for index, parameter in enumerate(group["params"])
    ]
    if hasattr(optimizer, "init_state"):  # bitsandbytes, which makes the constants too
        for name, parameter, group, number, index in places:
            optimizer.init_state(group, parameter, number, index)
            state = optimizer.state[parameter]
            state["step"] = checkpoint.step
            for kind, tensor in saved[name].items():
                state[kind].copy_(tensor)
        return
    step = torch.tensor(float(checkpoint.step))
    states = {place: {"step": step.clone(), **saved[name]} for place, (name, *_) in enumerate(places)}
    # PyTorch decides where each tensor lives: a fused AdamW reads `step` on the parameter's device, another on the CPU
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
