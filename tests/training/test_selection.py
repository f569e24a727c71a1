"""Rows chosen by number: the run is that on a file of these rows, resumes as itself, and refuses other rows."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lmtune.data.selection import Selection
from lmtune.errors import CheckpointError
from lmtune.runs.store import RunDirectory
from lmtune.training.loop import StepEvent
from lmtune.training.run import FinetuneResult, run_finetune
from tests.workplace import QUESTIONS, RESTLESS, config_of, inside, lasting, make_workplace, write_rows

pytestmark = pytest.mark.slow  # seconds together; left out of `make test-fast`

CHOSEN = Selection((3, 0, 3, 17, 9, 22, 8, 8, 8, 1), weights=(1.0, 0.5, 2.0, 1.0, 1.0, 1.5, 1.0, 0.25, 1.0, 1.0))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A workplace of its own."""
    return make_workplace(tmp_path / "work")


def train(place: Path, selection: Selection | None = None, hooks: Any = (), **changes: Any) -> FinetuneResult:
    """A run in `place`."""
    config = config_of(**{**RESTLESS, **changes})
    with inside(place):
        return run_finetune(config, RunDirectory.of(config.run), selection, hooks)


def test_a_run_of_chosen_rows_is_that_on_a_file_of_them(place: Path) -> None:
    """Some rows twice, in another order, with weights of their own and the file's."""
    rows = [{**row, "weight": 2.0} if number == 9 else row for number, row in enumerate(QUESTIONS)]
    write_rows(place / "train.jsonl", rows)
    weights = CHOSEN.weights or ()
    of_file = [
        {**rows[number], "weight": float(rows[number].get("weight", 1)) * weight}
        for number, weight in zip(CHOSEN.train, weights, strict=True)
    ]
    write_rows(place / "some.jsonl", of_file)
    train(place, CHOSEN)
    train(place, run__name="plain", data__train="some.jsonl")
    chosen, plain = lasting(place), lasting(place, "plain")
    name = "adapter_model.safetensors"
    assert chosen["adapter"][name] == plain["adapter"][name]
    assert [chosen[key] for key in ("metrics", "results", "answers", "scores")] == [
        plain[key] for key in ("metrics", "results", "answers", "scores")
    ]
    told = json.loads((place / "runs" / "trial" / "data.json").read_text())
    assert told["selected"] == {"rows": 10, "different": 7}


def test_validation_rows_may_be_chosen_too(place: Path) -> None:
    """Those of a file, as if it were the validation file."""
    selection = Selection(tuple(range(4, 24)), validation=(0, 1, 2, 3))
    write_rows(place / "some.jsonl", QUESTIONS[4:])
    write_rows(place / "held.jsonl", QUESTIONS[:4])
    train(place, selection, data__validation=None, data__validation_fraction=0.0)
    train(place, run__name="plain", data__train="some.jsonl", data__validation="held.jsonl")
    assert lasting(place)["scores"] == lasting(place, "plain")["scores"]
    assert lasting(place)["results"] == lasting(place, "plain")["results"]


def test_it_resumes_bit_for_bit_and_without_being_told_the_rows_again(place: Path) -> None:
    train(place, CHOSEN)
    whole = lasting(place)
    run = RunDirectory(place / "runs" / "trial")
    shutil.rmtree(run.checkpoints / "step-000008")
    summary = json.loads(run.summary.read_text())
    run.summary.write_text(json.dumps({**summary, "status": "running", "tuned": None}))
    shutil.rmtree(run.adapter)
    seen: list[int] = []

    class Seen:
        def after_step(self, event: StepEvent) -> str:
            seen.append(event.state.step)
            return "continue"

    train(place, hooks=[Seen()])  # as the plain command would
    assert seen == [7, 8]
    assert lasting(place) == whole
    assert RunDirectory(run.path).read_selection() == CHOSEN


@pytest.mark.parametrize("keep_checkpoints", [True, False])
def test_other_rows_are_refused(place: Path, keep_checkpoints: bool) -> None:
    train(place, CHOSEN)
    run = RunDirectory(place / "runs" / "trial")
    if not keep_checkpoints:
        shutil.rmtree(run.checkpoints)
    before = load_file(run.adapter / "adapter_model.safetensors")
    for other in (replace(CHOSEN, weights=None), replace(CHOSEN, train=(*CHOSEN.train[1:], 3))):
        with pytest.raises(CheckpointError, match=r"cannot resume.*\n  the selected rows \(selection.json\): changed"):
            train(place, other)
    assert train(place, CHOSEN).was_complete
    assert before.keys() == load_file(run.adapter / "adapter_model.safetensors").keys()


def test_rows_that_are_not_there_are_named(place: Path) -> None:
    with pytest.raises(CheckpointError, match="row 24 is named, counted from 0; there are 24"):
        train(place, Selection((0, 24)))
    assert not (place / "runs").exists()


@pytest.mark.parametrize(
    ("tree", "fault"),
    [
        ({"train": []}, "rows to train on"), ({"train": [1, -1]}, "from 0 on"),
        ({"train": [0, 1], "weights": [1.0]}, "one for each of 2"), ({"train": [0], "weights": [0.0]}, "above 0"),
        ({"train": ["1"]}, "lists of row numbers"), ({"train": 3}, "lists of row numbers"),
    ],
)  # fmt: skip
def test_a_damaged_selection_is_refused(tmp_path: Path, tree: dict[str, Any], fault: str) -> None:
    run = RunDirectory(tmp_path)
    run.selection.write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match=f"selection.json: damaged: .*{fault}"):
        run.read_selection()


def test_a_selection_survives_being_written() -> None:
    for selection in (CHOSEN, Selection((0,), ()), Selection((1, 0), (2,))):
        again = Selection.from_dict(json.loads(json.dumps(selection.to_dict())))
        assert (again, again.sha256) == (selection, selection.sha256)
