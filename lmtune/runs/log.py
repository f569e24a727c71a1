"""What a run writes of each step: `metrics.jsonl` for programs, `results.csv` for a spreadsheet.

One line a step in both. On resuming, lines after the checkpoint are cut, so that a step never stands there twice. What
is there from before is looked at first: a run is not gone on with over records that it could not have written.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from lmtune.errors import CheckpointError
from lmtune.io.atomic import keep_lines, name_disk_errors
from lmtune.runs.store import RunDirectory

COLUMNS = (
    "step", "elapsed_tokens", "elapsed_examples", "training_loss", "training_sequence_accuracy",
    "training_token_accuracy", "validation_loss", "validation_sequence_accuracy", "validation_token_accuracy",
)  # fmt: skip
T = TypeVar("T")


@dataclass(frozen=True)
class StepRecord:
    """One line of `metrics.jsonl`; everything but `epoch` is of this step alone.

    `tokens` are real tokens, never padding; `seconds` are wall time; `grad_norm` is before clipping.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    examples: int
    seconds: float


@dataclass(frozen=True)
class Accuracies:
    """The accuracy columns of `results.csv` for the training or the validation rows; shares from 0 to 1."""

    loss: float
    sequence_accuracy: float
    token_accuracy: float


class Records:
    """Appends to both files. Only the first process has one that writes."""

    def __init__(self, run: RunDirectory, enabled: bool) -> None:
        self.run, self.enabled = run, enabled

    def begin(self, done_steps: int) -> None:
        """Keep the lines of the first `done_steps` steps and start both files if they are new."""
        if not self.enabled:
            return
        for path, step_of in ((self.run.metrics, _metrics_step), (self.run.results, _results_step)):
            keep_lines(path, sum(step <= done_steps for step in _read(path, step_of)))
        if not self.run.results.is_file() or not self.run.results.stat().st_size:
            self._append(self.run.results, ",".join(COLUMNS))
        self.run.metrics.touch()

    def add(
        self, record: StepRecord, elapsed: tuple[int, int], training: Accuracies, validation: Accuracies | None
    ) -> None:
        """Write one step.

        Args:
            record: the step.
            elapsed: tokens and examples since the start of the run, this step included.
            training: of the step's rows.
            validation: of the validation rows, if they were scored after this step.
        """
        if not self.enabled:
            return
        self._append(self.run.metrics, json.dumps(asdict(record), allow_nan=False))
        cells: list[object] = [record.step, *elapsed]
        for part in (training, validation):
            cells += ["", "", ""] if part is None else [part.loss, part.sequence_accuracy, part.token_accuracy]
        line = io.StringIO()
        csv.writer(line, lineterminator="").writerow(f"{c:.6g}" if isinstance(c, float) else c for c in cells)
        self._append(self.run.results, line.getvalue())

    @staticmethod
    def _append(path: Path, line: str) -> None:
        with name_disk_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def recorded_steps(run: RunDirectory) -> list[int]:
    """The steps that `metrics.jsonl` tells of; the files of records beside it are looked at too.

    Raises:
        CheckpointError: one of them is not what a run writes; names the line.
    """
    _read(run.results, _results_step)
    read_answers(run)
    return _read(run.metrics, _metrics_step)


def step_records(run: RunDirectory) -> list[StepRecord]:
    """Every step of `metrics.jsonl`; none before the first.

    Raises:
        CheckpointError: a line is not what a run writes.
    """
    names = {field.name for field in fields(StepRecord)}
    return _read(run.metrics, lambda line: StepRecord(**{k: v for k, v in _object(line).items() if k in names}))


def read_answers(run: RunDirectory) -> list[dict[str, Any]]:
    """The rows of `answers.jsonl`; none if it is not there.

    Raises:
        CheckpointError: it is not what a run writes; names the line.
    """
    return _read(run.answers, _object)


def _read(path: Path, parse: Callable[[bytes], T]) -> list[T]:
    """Each whole line of a file, parsed; a last one that a crash left half written is passed over."""
    if not path.exists():
        return []
    if not path.is_file():
        raise CheckpointError(f"{path}: is no file, so nothing can be recorded there; remove it")
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            found.append(parse(line))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise CheckpointError(
                f"{path}:{number}: damaged, for a run writes no such line; restore the file from a copy, or delete it "
                "if you can do without"
            ) from None
    return found


def _object(line: bytes) -> dict[str, Any]:
    tree = json.loads(line.decode("utf-8"))
    if not isinstance(tree, dict):
        raise ValueError("no object")
    return tree


def _metrics_step(line: bytes) -> int:
    step = _object(line)["step"]
    if type(step) is not int:
        raise ValueError("no step")
    return step


def _results_step(line: bytes) -> int:
    """0 for the line of names."""
    first = line.decode("utf-8").partition(",")[0]
    return 0 if first == COLUMNS[0] else int(first)
