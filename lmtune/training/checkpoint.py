"""Checkpoints: written beside their place, complete, checksummed, and only then given their name.

    checkpoints/step-000100/   adapter_model.safetensors  optimizer.safetensors  state.json  manifest.json

A checkpoint is what is trained, AdamW's two moments for each, and a small JSON; data order, dropout and the
learning rate follow from the step, so nothing else is needed to resume bit for bit. The manifest (sizes, SHA-256) is
written last: a folder without one that matches is not a checkpoint. No pickle anywhere.

Where several processes hold the tensors together, each writes its part; any number of processes can read them:

    checkpoints/step-000100/   weights/shard-00001-….safetensors …   optimizer/…   state.json   manifest.json
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from lmtune.errors import CheckpointError, LmtuneError
from lmtune.io.atomic import parse_object, staged_folder
from lmtune.io.text import format_list
from lmtune.models.tensor_shards import (
    TensorShards,
    checkpoint_weights,
    copy_into,
    shapes_of,
    shards_of,
    write_shards,
)
from lmtune.models.tuning.base import Tensors
from lmtune.parallel.base import Parallel
from lmtune.runs.store import (
    ADAPTER,
    MANIFEST,
    MOMENTS,
    OPTIMIZER,
    STATE,
    WEIGHTS,
    checkpoint_folder,
    checkpoint_folders,
    fingerprint,
    problem_of,
    step_of,
)
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
    target = checkpoint_folder(folder, checkpoint.step)
    if target.exists() and not problem_of(target):
        return target
    with _naming(target), staged_folder(target, _staging(target)) as staging:
        save_file(dict(checkpoint.weights), staging / ADAPTER, metadata={"format": "pt"})
        save_file(dict(checkpoint.optimizer), staging / OPTIMIZER, metadata={"format": "pt"})
        _finish(staging, checkpoint.state, {name: fingerprint(staging / name) for name in (ADAPTER, OPTIMIZER)})
    return target


def save_together(folder: Path, checkpoint: Checkpoint, parallel: Parallel) -> Path:
    """As `save_checkpoint`, by all ranks at once, which hold the tensors together; each writes its part."""
    target = checkpoint_folder(folder, checkpoint.step)
    if parallel.gather([target.exists() and not problem_of(target)])[0]:
        return target
    staging = _staging(target)
    with _naming(target), staged_folder(target, staging) if parallel.is_main else contextlib.nullcontext():
        parallel.barrier()  # the folder is there
        written: dict[str, dict[str, int | str]] = {}
        for name, tensors in ((WEIGHTS, checkpoint.weights), (MOMENTS, checkpoint.optimizer)):
            with parallel.collective():
                write_shards(staging / name, tensors)
            own = shards_of(staging / name, parallel.rank)
            written |= {path.relative_to(staging).as_posix(): fingerprint(path) for path in own}
        manifest = dict(entry for part in parallel.gather([written]) for entry in part.items())
        if parallel.is_main:
            _finish(staging, checkpoint.state, manifest)
    return target


def _staging(target: Path) -> Path:
    return target.with_name(f".staging-{target.name}")


def _finish(staging: Path, state: CheckpointState, manifest: Mapping[str, Mapping[str, int | str]]) -> None:
    """Write the state, and last the manifest of all files."""
    text = json.dumps(state.to_dict(), indent=2, allow_nan=False)
    (staging / STATE).write_text(text, encoding="utf-8")
    whole = {**manifest, STATE: fingerprint(staging / STATE)}
    (staging / MANIFEST).write_text(json.dumps(whole, indent=2), encoding="utf-8")


@contextlib.contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Say of whatever goes wrong inside that the checkpoint could not be written."""
    try:
        yield
    except LmtuneError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or error
        raise LmtuneError(
            f"cannot write the checkpoint {target}: {reason}; make room or permit writing, then start the same command "
            "again: it resumes from the checkpoint before"
        ) from error


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
    whole = path / OPTIMIZER
    moments = load_file(whole) if whole.exists() else TensorShards(path / MOMENTS)
    return Checkpoint(checkpoint_weights(path), moments, state)


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
        f"{kind}.{name}": tensor.detach().contiguous()
        for name, parameter in parameters.items()
        for kind, tensor in optimizer.state[parameter].items()
        if kind not in _DERIVED
    }


def restore(
    checkpoint: Checkpoint, optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> None:
    """Put a checkpoint's tensors into the model and the optimizer; CheckpointError if they do not fit."""
    if shapes_of(parameters) != shapes_of(checkpoint.weights):
        raise CheckpointError("the checkpoint has other tensors than this model; see tuning and model.name")
    copy_into(parameters, checkpoint.weights)
    names = {id(parameter): name for name, parameter in parameters.items()}
    kinds: dict[str, list[str]] = {name: [] for name in parameters}
    for key in checkpoint.optimizer:
        kind, _, name = key.partition(".")
        kinds[name].append(kind)
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
            for kind in kinds[name]:
                state[kind].copy_(checkpoint.optimizer[f"{kind}.{name}"])
        return
    moments = {f"{kind}.{name}": torch.empty_like(parameters[name]) for name in parameters for kind in kinds[name]}
    copy_into(moments, checkpoint.optimizer)
    step = torch.tensor(float(checkpoint.step))
    states = {
        place: {"step": step.clone(), **{kind: moments[f"{kind}.{name}"] for kind in kinds[name]}}
        for place, (name, *_) in enumerate(places)
    }
    # PyTorch decides where each tensor lives: a fused AdamW reads `step` on the parameter's device, another on the CPU
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
