"""Training jobs over a tiny random model, run in this process or in a child that is killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lmtune.config.load import build_config
from lmtune.config.schema import FinetuneConfig
from lmtune.evaluation.scoring import Scores
from lmtune.forward.packed import PackedForward
from lmtune.models.head import Head
from lmtune.models.parameters import count_parameters
from lmtune.models.tuning.base import TunedModel
from lmtune.objectives.chosen import objective_of
from lmtune.parallel.single import Single
from lmtune.runs.events import EventLog
from lmtune.runs.store import RunDirectory
from lmtune.training.checkpoint import Checkpoint
from lmtune.training.compose import TUNINGS, Components
from lmtune.training.loop import TrainingJob
from lmtune.training.run import run_loop
from lmtune.training.state import TrainResult
from tests.tiny import Rows, adapted, random_rows, tiny_model


@dataclass
class Job:
    """A run's loop over tiny parts.

    Attributes:
        run: where files go.
        parts: of the run.
        resumed: the checkpoint to resume from.
    """

    run: RunDirectory
    parts: Components
    resumed: Checkpoint | None = None

    @property
    def forward(self) -> PackedForward:
        return self.parts.forward

    @property
    def data(self) -> Rows:
        return self.parts.data.train

    @property
    def loop(self) -> TrainingJob:
        """What the loop would work with."""
        return self.parts.job()[0]

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return self.parts.model.trainable()


def job_for(
    folder: Path, dropout: float = 0.0, resumed: Checkpoint | None = None,
    validate: Callable[[], Scores] | None = None, model: Any = None, tuning: dict[str, Any] | None = None,
    objective: dict[str, Any] | None = None, rows: Rows | None = None, head: Head | None = None, **settings: Any,
) -> Job:  # fmt: skip
    """A job of 12 rows, batches of 4, over a tiny model; settings as `section__key`, sections as in a config.

    Without `tuning` an adapter learns whose B is not zero at the start.
    """
    tree: dict[str, dict[str, Any]] = {
        "model": {"name": "tiny-random", "quantization": "none"}, "data": {"train": "rows.jsonl"},
        "train": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2}, "evaluation": {}, "run": {"name": "test"},
    }  # fmt: skip
    for key, value in settings.items():
        section, _, name = key.partition("__")
        tree[section][name] = value
    if tuning is not None:
        tree["tuning"] = tuning
    if objective is not None:
        tree["objective"] = objective
    config = build_config(FinetuneConfig, tree, "test")
    folder.mkdir(exist_ok=True)
    way = TUNINGS[type(config.tuning)](config.tuning, config.model, None)
    if tuning is not None:
        tuned = way.apply(tiny_model() if model is None else model, 1, "tiny-random")
    else:
        tuned = TunedModel(adapted(tiny_model(), dropout=dropout) if model is None else model)
    parameters = count_parameters(tiny_model(), config.tuning, "none", torch.float32)
    asked = config.train.micro_batch_tokens
    rows = rows or random_rows(12)
    data: Any = SimpleNamespace(train=rows, validation=rows if validate else None, key="x", signature="x")
    parts = Components(
        config, Single(), None, data, way, objective_of(config.objective, head), tuned, PackedForward(tuned.module),
        "base", parameters, 10**6 if asked == "auto" else asked, head=head,
    )  # fmt: skip
    if validate is not None:
        parts.validate = validate
    return Job(RunDirectory(folder), parts, resumed)


def train(job: Job) -> TrainResult:
    """Make the job's steps."""
    events = EventLog(job.run)
    events.begin(0 if job.resumed is None else job.resumed.step)
    return run_loop(job.run, job.parts, job.resumed, events)


def final_weights(job: Job) -> dict[str, torch.Tensor]:
    """Train; what is trained as it is then."""
    train(job)
    return {name: parameter.detach().clone() for name, parameter in job.trainable.items()}


def records(job: Job) -> list[dict[str, Any]]:
    """The job's metrics, but for times."""
    lines = [json.loads(line) for line in job.run.metrics.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
