"""Training jobs over a tiny random model, run in this process or in a child that is killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lmtune.config.load import build_config
from lmtune.config.schema import FinetuneConfig
from lmtune.forward.packed import PackedForward
from lmtune.models.tuning.lora import trainable
from lmtune.runs.store import RunDirectory
from lmtune.training.checkpoint import newest_checkpoint
from lmtune.training.loop import Job, train
from tests.tiny import OneProcess, adapted, random_rows, tiny_model


def job_for(folder: Path, dropout: float = 0.0, resumed: Any = None, validate: Any = None, **settings: Any) -> Job:
    """A job of 12 rows, batches of 4, over a tiny model; settings as `section__key`."""
    tree: dict[str, dict[str, Any]] = {
        "model": {"name": "tiny-random", "quantization": "none"}, "data": {"train": "rows.jsonl"},
        "train": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2}, "evaluation": {}, "run": {"name": "test"},
    }  # fmt: skip
    for key, value in settings.items():
        section, _, name = key.partition("__")
        tree[section][name] = value
    config = build_config(FinetuneConfig, tree, "test")
    folder.mkdir(exist_ok=True)
    forward = PackedForward(adapted(tiny_model(), dropout=dropout))
    budget = 10**6 if config.train.micro_batch_tokens == "auto" else config.train.micro_batch_tokens
    return Job(
        RunDirectory(folder), config, forward, random_rows(12), OneProcess(), budget, {"data": "x"}, validate, resumed
    )


def final_weights(job: Job) -> dict[str, torch.Tensor]:
    """Train; the adapter as it is then."""
    train(job)
    return {name: parameter.detach().clone() for name, parameter in trainable(job.forward.model).items()}


def resumed_job(folder: Path, **settings: Any) -> Job:
    """The same job again, from the newest checkpoint that is whole."""
    return job_for(folder, resumed=newest_checkpoint(folder / "checkpoints")[0], **settings)


def records(job: Job) -> list[dict[str, Any]]:
    """The job's metrics, but for times."""
    lines = [json.loads(line) for line in job.run.metrics.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
