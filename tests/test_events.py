"""events.jsonl: typed events, one a line, cut on resume, without secrets and absolute paths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmtune.errors import CheckpointError
from lmtune.io.console import warn, warnings_heard_by
from lmtune.runs.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    EventLog,
    StatusChanged,
    StepDone,
    Warned,
    event_tree,
    read_events,
)
from lmtune.runs.store import RunDirectory
from tests.workplace import finetune, make_workplace


def step(number: int) -> StepDone:
    """A step of its number."""
    return StepDone(number, number / 4, 1 / number, 1e-4, 0.5, 100, 30, 4, 0.25, {"margin": 0.5})


EVENTS: list[Event] = [
    StatusChanged(0, "running"), Evaluated(0, "base", {"loss": 3.0, "exact_match": None}), step(1), step(2),
    Evaluated(2, "validation", {"loss": 2.5}, "loss", 2), CheckpointSaved(2, "checkpoints/step-000002", 0.1), step(3),
    Warned(3, "out of memory"), Evaluated(3, "tuned", {"loss": 2.0}), StatusChanged(3, "failed", "a reason"),
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run of three steps that failed."""
    found = RunDirectory(tmp_path)
    log = EventLog(found)
    log.begin(0)
    for event in EVENTS:
        log.add(event)
    return found


def test_events_are_read_back_as_they_were_written(run: RunDirectory) -> None:
    assert read_events(run) == EVENTS
    first = json.loads(run.events.read_text().splitlines()[2])
    assert list(first)[:3] == ["type", "time", "step"]
    assert (first["type"], first["loss"], first["metrics"]) == ("step", 1.0, {"margin": 0.5})


@pytest.mark.parametrize(
    ("done", "knows_base", "left"),
    [
        (2, True, ["status", "base", 1, 2, "validation", "checkpoint", "warning", "status"]),
        (1, True, ["status", "base", 1, "warning", "status"]),
        (0, False, ["status", "warning", "status"]),
    ],
)
def test_resuming_cuts_what_is_done_again(
    run: RunDirectory, done: int, knows_base: bool, left: list[str | int]
) -> None:
    with run.events.open("a") as file:
        file.write('{"type": "step", "st')  # a crash in the middle of a line
    EventLog(run).begin(done, knows_base)
    found = [
        event.step if isinstance(event, StepDone) else event.of if isinstance(event, Evaluated) else event.type
        for event in read_events(run)
    ]
    assert found == left


@pytest.mark.parametrize(
    "line",
    ['{"type": "step"', '{"type": "pause", "step": 1}', '{"type": "status", "step": 1, "status": "lost"}',
     '{"type": "checkpoint", "step": "two", "folder": "x", "seconds": 1}'],
)  # fmt: skip
def test_a_line_that_no_run_writes_is_named(run: RunDirectory, line: str) -> None:
    with run.events.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(CheckpointError, match=r"events\.jsonl:11: damaged"):
        read_events(run)


def test_warnings_wait_until_the_run_is_ours_and_hold_no_secret(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    log = EventLog(run)
    with warnings_heard_by(log.warn):
        warn(f"hf_{'a' * 30} and https://me:word@host and /srv/private/rows.jsonl")
    warn("not of this run")
    assert not run.events.exists()
    log.begin(0)
    (told,) = read_events(run)
    assert isinstance(told, Warned)
    assert told.message.startswith("… and https://…@host and ")
    assert " /srv" not in told.message


def test_a_run_tells_what_it_does(tmp_path: Path) -> None:
    run, summary = finetune(
        make_workplace(tmp_path), evaluation__every_steps=4, run__checkpoint_every_steps=3,
        evaluation__patience=9, train__max_steps=8,
    )  # fmt: skip
    events = read_events(run)
    assert [type(event) for event in events if event.step == 8] == [
        StepDone, Evaluated, CheckpointSaved, Evaluated, StatusChanged,
    ]  # fmt: skip
    metrics = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    own = ("type", "time", "metrics")
    steps = [event_tree(event) for event in events if isinstance(event, StepDone)]
    assert [{**{k: v for k, v in one.items() if k not in own}, **one["metrics"]} for one in steps] == metrics
    scored = [(event.of, event.step) for event in events if isinstance(event, Evaluated)]
    assert scored == [("base", 0), ("validation", 4), ("validation", 8), ("tuned", 8)]
    tuned = [event.scores for event in events if isinstance(event, Evaluated)][-1]
    assert tuned == summary["tuned"]
    saved = [event.folder for event in events if isinstance(event, CheckpointSaved)]
    assert "checkpoints/step-000003" in saved
    assert [event.status for event in events if isinstance(event, StatusChanged)] == ["running", "complete"]
    assert 0 < summary["estimated_memory_gib"] == summary["estimate"]["memory_gib"] < 1
    assert summary["estimate"]["memory_gib"] == pytest.approx(
        sum(size for name, size in summary["estimate"].items() if name != "memory_gib"), abs=1e-3
    )
