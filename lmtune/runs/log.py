"""What a run writes of each step, and how it is read back: `metrics.jsonl` for programs, `results.csv` for a
spreadsheet, `predictions.jsonl` with the held-out rows.

One line a step. On resuming, lines after the checkpoint are cut, so that a step never stands there twice; damaged
records are refused. Who only looks at a run (`last_steps`) passes over what is half written now.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TypeVar

from lmtune.errors import CheckpointError
from lmtune.io.atomic import keep_lines, name_disk_errors, parse_object
from lmtune.io.text import is_finite_number
from lmtune.runs.store import RunDirectory

COLUMNS = (
    "step", "elapsed_tokens", "elapsed_examples", "training_loss", "training_sequence_accuracy",
    "training_token_accuracy", "validation_loss", "validation_sequence_accuracy", "validation_token_accuracy",
)  # fmt: skip
T = TypeVar("T")
_TAIL_BYTES = 65_536  # holds the last lines of metrics.jsonl many times over


@dataclass(frozen=True)
class StepRecord:
    """One line of `metrics.jsonl`; everything but `epoch` is of this step alone.

    `tokens` are real tokens, never padding; `seconds` are wall time; `grad_norm` is before clipping; `metrics` are the
    objective's own, by name.
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
    metrics: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, line: bytes) -> StepRecord:
        """The step in a line of JSON; ValueError if a run writes no such line."""
        tree = parse_object(line)
        values = {own.name: tree.pop(own.name, None) for own in fields(cls) if own.name != "metrics"}
        if not all(map(is_finite_number, values.values())) or not isinstance(values["step"], int):
            raise ValueError("not the record of a step")
        metrics = {name: value for name, value in tree.items() if is_finite_number(value)}
        return cls(**values, metrics=metrics)

    def as_dict(self) -> dict[str, float]:
        """What stands in the line, the metrics among the rest."""
        own = asdict(self)
        metrics = own.pop("metrics")
        return {**own, **metrics}


@dataclass(frozen=True)
class Accuracies:
    """The accuracy columns of `results.csv` for the training or the validation rows; shares from 0 to 1."""

    loss: float
    sequence_accuracy: float
    token_accuracy: float | None  # of answers alone


class Records:
    """Appends to both files; for rank 0 alone."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run

    def begin(self, done_steps: int) -> None:
        """Keep the lines of the first `done_steps` steps and start both files if they are new."""
        keep_lines(self.run.metrics, sum(record.step <= done_steps for record in step_records(self.run)))
        keep_lines(self.run.results, sum(step <= done_steps for step in read_lines(self.run.results, _results_step)))
        if not self.run.results.is_file() or not self.run.results.stat().st_size:
            self._append(self.run.results, ",".join(COLUMNS))
        self.run.metrics.touch()

    def add(
        self, record: StepRecord, elapsed: tuple[int, int], training: Accuracies, validation: Accuracies | None
    ) -> None:
        """Write one step.

        `elapsed` are the tokens and examples of the run so far; `validation` is None where it was not scored.
        """
        self._append(self.run.metrics, json.dumps(record.as_dict(), allow_nan=False))
        cells: list[object] = [record.step, *elapsed]
        for part in (training, validation):
            cells += [None] * 3 if part is None else [part.loss, part.sequence_accuracy, part.token_accuracy]
        line = io.StringIO()
        csv.writer(line, lineterminator="").writerow(f"{c:.6g}" if isinstance(c, float) else c for c in cells)
        self._append(self.run.results, line.getvalue())

    @staticmethod
    def _append(path: Path, line: str) -> None:
        with name_disk_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def step_records(run: RunDirectory) -> list[StepRecord]:
    """Every step of `metrics.jsonl`; empty before the first. CheckpointError names a damaged line."""
    return read_lines(run.metrics, StepRecord.parse)


def read_predictions(run: RunDirectory) -> list[dict[str, str]]:
    """The rows of `predictions.jsonl`: question, reference and each model's answer; empty if it is not there."""
    return read_lines(run.predictions, parse_object)


def recorded_steps(run: RunDirectory) -> list[int]:
    """The steps that `metrics.jsonl` tells of; CheckpointError names a damaged line of any of the three files."""
    read_lines(run.results, _results_step)
    read_predictions(run)
    return [record.step for record in step_records(run)]


def last_steps(run: RunDirectory, count: int) -> list[StepRecord]:
    """The last `count` whole lines of `metrics.jsonl`, oldest first; reads the file's end only."""
    try:
        with run.metrics.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]  # after the last newline comes nothing, or half a line
    except OSError:
        return []
    return list(_whole_records(lines[-count - 1 :]))[-count:]


def _whole_records(lines: list[bytes]) -> Iterator[StepRecord]:
    """The lines that a run writes; others are passed over."""
    for line in lines:
        try:
            record = StepRecord.parse(line)
        except ValueError:
            continue
        yield record


def read_lines(path: Path, parse: Callable[[bytes], T]) -> list[T]:
    """Each whole line of a file, parsed; a last one that a crash left half written is passed over."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(parse(line))
        except ValueError:
            raise CheckpointError(
                f"{path}:{number}: damaged: corrupt line; restore the file from a copy, or delete it if you can do "
                "without"
            ) from None
    return found


def _results_step(line: bytes) -> int:
    """0 for the line of names."""
    first = line.decode("utf-8").partition(",")[0]
    return 0 if first == COLUMNS[0] else int(first)
