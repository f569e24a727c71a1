"""What a run tells becomes events of its job, in OpenAI's words; and its results a file that pandas reads.

    follower = Follower(store, job, run)
    follower.look()        # again and again; what was told is not told twice, also by a later server

Names of figures are those that OpenAI gives: `train_loss`, `train_mean_token_accuracy`, `valid_loss`, `total_steps`, ….
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from lmtune.batching.plan import Planner
from lmtune.config.schema import TrainConfig
from lmtune.data.report import HeldOut
from lmtune.errors import LmtuneError
from lmtune.runs.events import CheckpointSaved, Evaluated, Event, EventReader, StatusChanged, StepDone, Warned
from lmtune.runs.history import results_tree
from lmtune.runs.store import RunDirectory
from lmtune.serve.fine_tuning.store import Store, event_id

RESULTS = {
    "step": "step", "train_loss": "training_loss", "train_accuracy": "training_token_accuracy",
    "valid_loss": "validation_loss", "valid_mean_token_accuracy": "validation_token_accuracy",
}  # fmt: skip


class Follower:
    """Reads the events of a run as they are written."""

    def __init__(self, store: Store, job: str, run: RunDirectory, train: TrainConfig) -> None:
        self.store, self.job, self.run, self.train = store, job, run, train
        self._reader = EventReader(run.events)
        self._total: int | None = None

    def look(self) -> None:
        """Take over what is new."""
        events = list(self._reader.new_events())
        if events:
            with self.store.together():
                for event in events:
                    self._take(event)

    def _take(self, event: Event) -> None:
        at = datetime.fromisoformat(event.time).timestamp()
        match event:
            case StepDone():
                accuracy = event.metrics.get("token_accuracy")
                figures = {name: value for name, value in event.metrics.items() if name != "token_accuracy"}
                figures |= {} if accuracy is None else {"train_mean_token_accuracy": accuracy}
                self._tell_step(event.step, {"train_loss": event.loss, **figures}, at)
            case Evaluated(of="validation"):
                known = self.store.event(event_id(self.job, f"step-{event.step}"))
                before = {} if known is None else known.data or {}
                self._tell_step(event.step, {**before, **_named("valid", event.scores)}, at)
            case Evaluated(of="tuned"):
                data = {"step": event.step, **_named("full_valid", event.scores)}
                self._say(f"Validation loss of the new model: {event.scores.get('loss') or 0:.2f}", "scored", at, data)
            case CheckpointSaved():
                key = f"checkpoint-{event.step}"
                self._say(f"Checkpoint created at step {event.step}", key, at, {"step": event.step})
            case Warned():
                self.store.add_event(self.job, event.message, "warn", None, f"warning-{at:.3f}", at)
            case StatusChanged(status="running") if event.step:
                self._say(f"Resumed after step {event.step}", f"resumed-{at:.3f}", at)

    def _tell_step(self, step: int, figures: Mapping[str, object], at: float) -> None:
        total = self._total_steps()
        data = {**figures, "step": step, "total_steps": total}
        where = f"Step {step}/{total}" if total else f"Step {step}"
        losses = [("training", data.get("train_loss")), ("validation", data.get("valid_loss"))]
        said = ", ".join(f"{name} loss={loss:.2f}" for name, loss in losses if isinstance(loss, float))
        self._say(f"{where}: {said}", f"step-{step}", at, data)

    def _say(self, message: str, key: str, at: float, data: Mapping[str, object] | None = None) -> None:
        self.store.add_event(self.job, message, "info", data, key, at)

    def _total_steps(self) -> int | None:
        """The steps of the whole run; None where its data do not say it."""
        if self._total is None:
            try:
                report = self.run.read_data_report()
            except LmtuneError:
                return None
            if report is not None:
                rows = report.train.kept
                held = report.validation
                rows -= held.held_out + held.copies if isinstance(held, HeldOut) else 0
                self._total = Planner.count_steps(rows, self.train)
        return self._total


def write_results(run: RunDirectory, path: Path) -> None:
    """Write the steps of a run as OpenAI's table: a line a step, empty where nothing was scored."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(RESULTS)
        for row in results_tree(run):
            table.writerow(row.get(column) for column in RESULTS.values())


def _named(part: str, scores: Mapping[str, float | None]) -> dict[str, object]:
    names = {"loss": f"{part}_loss", "token_accuracy": f"{part}_mean_token_accuracy"}
    return {name: scores[key] for key, name in names.items() if scores.get(key) is not None}
