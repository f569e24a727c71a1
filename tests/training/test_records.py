"""metrics.jsonl and results.csv: the documented keys and columns, one line a step, also after a crash."""

import csv
import json
from pathlib import Path

import pytest

from lmtune.errors import CheckpointError
from lmtune.evaluation.generative import Answer
from lmtune.runs.log import Accuracies, Records, StepRecord, recorded_steps
from lmtune.runs.store import RunDirectory
from lmtune.training.run import add_tuned_predictions

COLUMNS = (
    "step,elapsed_tokens,elapsed_examples,training_loss,training_sequence_accuracy,training_token_accuracy,"
    "validation_loss,validation_sequence_accuracy,validation_token_accuracy"
)
KEYS = ["step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens", "examples", "seconds"]


def record(step: int) -> StepRecord:
    """What step `step` was."""
    return StepRecord(step, step / 10, 3.0 / step, 1e-4, 0.5, 100, 30, 4, 0.25)


def written(run: RunDirectory, *steps: int) -> Records:
    """Records of these steps; even ones were validated."""
    records = Records(run)
    records.begin(steps[0] - 1)
    for step in steps:
        validation = Accuracies(2.0, 0.25, 0.75) if step % 2 == 0 else None
        records.add(record(step), (100 * step, 4 * step), Accuracies(3.0 / step, 0.5, 0.6), validation)
    return records


def test_the_columns_and_keys_are_the_documented_ones(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    written(run, 1, 2, 3)
    lines = run.results.read_text().splitlines()
    assert lines[0] == COLUMNS
    assert lines[1] == "1,100,4,3,0.5,0.6,,,"
    assert lines[2] == "2,200,8,1.5,0.5,0.6,2,0.25,0.75"
    assert [list(json.loads(line)) for line in run.metrics.read_text().splitlines()] == [KEYS] * 3
    with run.results.open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3"]


@pytest.mark.parametrize("done", [0, 2, 3])
def test_going_on_after_a_step_cuts_the_later_lines(tmp_path: Path, done: int) -> None:
    run = RunDirectory(tmp_path)
    written(run, 1, 2, 3, 4)
    with run.metrics.open("a") as metrics, run.results.open("a") as results:
        metrics.write('{"step": 5, "ep')  # a crash in the middle of a line
        results.write("5,50")
    written(run, *range(done + 1, 7))
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    assert [line.split(",")[0] for line in run.results.read_text().splitlines()] == ["step", *"123456"]


def test_lines_after_the_checkpoint_are_cut_by_their_step_not_their_number(tmp_path: Path) -> None:
    """Where earlier lines were lost."""
    run = RunDirectory(tmp_path)
    written(run, 5, 6, 7)
    written(run, 7)
    assert recorded_steps(run) == [5, 6, 7]
    assert [line.split(",")[0] for line in run.results.read_text().splitlines()] == ["step", *"567"]


STEP = b'{"step": 1, "epoch": 1, "loss": 1, "learning_rate": 1, "grad_norm": 1, "tokens": 1, "trained_tokens": 1, '
STEP += b'"examples": 1, "seconds": 1}\n'
DAMAGED: dict[str, tuple[str, bytes]] = {
    "not UTF-8": ("metrics.jsonl:2", STEP + b"\xff\n"),
    "not JSON": ("metrics.jsonl:1", b"step 1\n"),
    "a step without its loss": ("metrics.jsonl:2", STEP + b'{"step": 2}\n'),
    "a step that is a word": ("metrics.jsonl:1", STEP.replace(b'"step": 1', b'"step": "1"')),
    "results: not a step": ("results.csv:2", b"step,\nx,2\n"),
    "predictions: not UTF-8": ("predictions.jsonl:1", b'{"question": "\xff"}\n'),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_record_that_no_run_writes_is_named(tmp_path: Path, what: str) -> None:
    place, content = DAMAGED[what]
    (tmp_path / place.partition(":")[0]).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{place}: damaged"):
        recorded_steps(RunDirectory(tmp_path))


def test_answers_may_hold_any_line_break(tmp_path: Path) -> None:
    """Python takes more characters for the end of a line than JSON lines do."""
    run = RunDirectory(tmp_path)
    run.predictions.write_text('{"question": "a\u2028b\x85c", "base": "x"}\n', encoding="utf-8")
    add_tuned_predictions(run, [Answer(0, "a", "b", "given")])
    row = json.loads(run.predictions.read_text(encoding="utf-8"))
    assert row == {"question": "a\u2028b\x85c", "base": "x", "tuned": "given"}
