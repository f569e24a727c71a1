"""A folder to work in, as a user has it: a base model, data files, and runs made by the finetune recipe itself."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lmtune.config.load import build_config
from lmtune.config.schema import FinetuneConfig
from lmtune.config.yaml import write_yaml
from lmtune.runs.store import RunDirectory
from tests.tiny import save_tiny
from tests.tokenizers import CHATML

QUESTIONS = [{"prompt": f"What is number {n}?", "completion": f"It is {7 * n % 10}."} for n in range(24)]
HELDOUT = [{"prompt": f"Say number {n}!", "completion": f"It is {7 * n % 10}."} for n in range(6)]
SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"name": "base", "quantization": "none"},
    "data": {"train": "train.jsonl", "validation": "validation.jsonl", "max_length": 128},
    "tuning": {"rank": 4, "alpha": 8},
    "train": {"max_steps": 8, "batch_size": 4, "learning_rate": 1e-2},
    "evaluation": {"exact_match_rows": 3, "max_new_tokens": 8},
    "run": {"name": "trial", "checkpoint_every_steps": 3},
}  # fmt: skip
# Dropout, an evaluation and a checkpoint now and then: whatever a run can do between two steps.
RESTLESS: dict[str, Any] = {
    "tuning__dropout": 0.3, "evaluation__every_steps": 2, "run__checkpoint_every_steps": 3,
    "train__micro_batch_tokens": 64,
}  # fmt: skip


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """One row a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_workplace(folder: Path, chat_template: str | None = CHATML, dtype: torch.dtype = torch.float32) -> Path:
    """Write base model and data."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tiny(folder / "base", chat_template=chat_template, dtype=dtype)
    write_rows(folder / "train.jsonl", QUESTIONS)
    write_rows(folder / "validation.jsonl", HELDOUT)
    return folder


def tree_of(**changes: Any) -> dict[str, dict[str, Any]]:
    """The settings as a nested mapping, with changes given as `section__key`."""
    tree = {section: dict(values) for section, values in SETTINGS.items()}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree.setdefault(section, {})[name] = value
    if tree["tuning"].get("kind", "lora") != "lora":  # it has settings of its own
        tree["tuning"] = {key: value for key, value in tree["tuning"].items() if key not in SETTINGS["tuning"]}
    return tree


def config_of(**changes: Any) -> FinetuneConfig:
    """The settings, checked."""
    return build_config(FinetuneConfig, tree_of(**changes), "test")


def write_config(folder: Path, **changes: Any) -> None:
    """`run.yaml` with the settings, for commands run in `folder`."""
    (folder / "run.yaml").write_text(write_yaml(tree_of(**changes)))


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in `folder`, with the row cache there too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LMTUNE_CACHE", str(folder / "cache"))
        yield


def finetune(folder: Path, **changes: Any) -> tuple[RunDirectory, dict[str, Any]]:
    """Run the recipe in this process; the run and its summary."""
    from lmtune.recipes.finetune import finetune as recipe

    config = config_of(**changes)
    with inside(folder):
        run = RunDirectory.of(config.run)
        summary = recipe(config, run)
    return RunDirectory(folder / run.path), dict(summary.tree)


def lasting(folder: Path, name: str = "trial") -> dict[str, Any]:
    """What must be the same bit for bit however often a run was killed: the result, and every record but times."""
    run = folder / "runs" / name
    lines, events = (
        [json.loads(line) for line in (run / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "events.jsonl")
    )
    summary = json.loads((run / "summary.json").read_text())
    return {
        "adapter": written_files(run / "adapter"),
        "model": written_files(run / "merged"),
        "metrics": [{key: value for key, value in line.items() if key != "seconds"} for line in lines],
        "events": [
            {key: value for key, value in event.items() if key not in ("time", "seconds")}
            for event in events
            if event["type"] in ("step", "evaluation")
        ],
        "results": (run / "results.csv").read_text(),
        "answers": (run / "predictions.jsonl").read_text(),
        "scores": [summary[key] for key in ("status", "base", "tuned", "steps", "best_step", "tokens", "examples")],
    }


def trained_weights(run: Path) -> dict[str, torch.Tensor]:
    """What a run has trained: its adapter, or its whole model."""
    adapter, model = run / "adapter" / "adapter_model.safetensors", run / "merged" / "model.safetensors"
    return load_file(adapter if adapter.exists() else model)


def checkpoints(folder: Path, name: str = "trial") -> list[str]:
    """What lies in the checkpoint folder of a run, staging included."""
    return sorted(path.name for path in (folder / "runs" / name / "checkpoints").iterdir())


def written_files(folder: Path) -> dict[str, bytes]:
    """The content of every file below `folder`, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def environment(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a command run in `folder`."""
    return {**os.environ, "LMTUNE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}
