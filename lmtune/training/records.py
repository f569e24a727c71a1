"""What a run writes of each step: `metrics.jsonl` for programs, `results.csv` for a spreadsheet.

One line a step in both. On resuming, lines after the checkpoint are cut, so that a step never stands there twice.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lmtune.runs import RunDirectory, keep_lines, naming

COLUMNS = (
    "step", "elapsed_tokens", "elapsed_examples", "training_loss", "training_sequence_accuracy",
    "training_token_accuracy", "validation_loss", "validation_sequence_accuracy", "validation_token_accuracy",
)  # fmt: skip


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
        keep_lines(self.run.metrics, done_steps)
        keep_lines(self.run.results, done_steps + 1)
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
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
