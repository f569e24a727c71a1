"""What happens in a run, one typed event a line of `events.jsonl`: the source of everything that is shown of it.

    {"type": "step", "time": "2026-01-31T12:00:00.000+00:00", "step": 7, "loss": 1.25, …}
    {"type": "evaluation", …}  {"type": "checkpoint", …}  {"type": "warning", …}  {"type": "status", …}

`step` counts the steps done by then. On resuming, the steps, evaluations and checkpoints after the checkpoint are cut,
as the other records are; warnings and changes of the status stay, since they happened. Damaged lines are refused; who
only looks on (`follow_events`) passes over what is half written now.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from lmtune.io.atomic import name_disk_errors, parse_object, write_text
from lmtune.io.console import without_secrets
from lmtune.io.text import without_absolute_paths
from lmtune.runs.log import StepRecord, read_lines
from lmtune.runs.store import RunDirectory, ScoreValues, Status

_OPEN = ConfigDict(extra="ignore", allow_inf_nan=False)  # another version may write more


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True)
class StepDone(StepRecord):
    """A step was made: what `metrics.jsonl` tells of it, the objective's own metrics under `metrics`."""

    __pydantic_config__ = _OPEN
    type: Literal["step"] = "step"
    time: str = field(default_factory=_now)


@dataclass(frozen=True)
class Evaluated:
    """Held-out rows were scored.

    Attributes:
        of: the base before training, the model in training (validation), or what is saved in the end (tuned).
        scores: by the names of `lmtune.evaluation.scoring.Scores`.
        metric: the score that chooses the best step; None before and after training.
        best_step: of the run so far; None before and after training.
    """

    __pydantic_config__ = _OPEN
    step: int
    of: Literal["base", "validation", "tuned"]
    scores: ScoreValues
    metric: str | None = None
    best_step: int | None = None
    type: Literal["evaluation"] = "evaluation"
    time: str = field(default_factory=_now)


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint is on the disk, whole.

    Attributes:
        folder: its place in the run's folder.
        seconds: that saving took.
    """

    __pydantic_config__ = _OPEN
    step: int
    folder: str
    seconds: float
    type: Literal["checkpoint"] = "checkpoint"
    time: str = field(default_factory=_now)


@dataclass(frozen=True)
class Warned:
    """Something is unusual, though the run goes on."""

    __pydantic_config__ = _OPEN
    step: int
    message: str
    type: Literal["warning"] = "warning"
    time: str = field(default_factory=_now)


@dataclass(frozen=True)
class StatusChanged:
    """The run begins or resumes after `step` (running), or ends; `reason` says why it did not come to its end."""

    __pydantic_config__ = _OPEN
    step: int
    status: Status
    reason: str = ""
    type: Literal["status"] = "status"
    time: str = field(default_factory=_now)


Event = StepDone | Evaluated | CheckpointSaved | Warned | StatusChanged
_PARSER: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="type")])


def parse_event(line: bytes) -> Event:
    """The event in a line of JSON; ValueError if a run writes no such line."""
    return _PARSER.validate_python(parse_object(line))


def event_tree(event: Event) -> dict[str, object]:
    """What stands in the line, the type and the time first."""
    tree = asdict(event)
    return {"type": tree.pop("type"), "time": tree.pop("time"), **tree}


class EventLog:
    """Appends events, for rank 0 alone; before `begin` says that the run is this process's, it only keeps them."""

    def __init__(self, run: RunDirectory) -> None:
        self.run, self.step = run, 0
        self._waiting: list[Event] | None = []

    def begin(self, done_steps: int, knows_base: bool = True) -> None:
        """Keep what happened in the first `done_steps` steps and is not done again, and write what has waited.

        `knows_base`: the base's scores are not measured again.
        """
        again = {"tuned"} if knows_base else {"tuned", "base"}
        kept = [
            json.dumps(event_tree(event), ensure_ascii=False) + "\n"
            for event in read_events(self.run)
            if isinstance(event, (Warned, StatusChanged))
            or (event.step <= done_steps and not (isinstance(event, Evaluated) and event.of in again))
        ]
        write_text(self.run.events, "".join(kept))
        self.step = done_steps
        waiting, self._waiting = self._waiting or [], None
        for event in waiting:
            self.add(event)

    def add(self, event: Event) -> None:
        """Write one event."""
        if self._waiting is not None:
            self._waiting.append(event)
            return
        self.step = max(self.step, event.step)
        line = json.dumps(event_tree(event), ensure_ascii=False, allow_nan=False)
        with name_disk_errors(self.run.events), self.run.events.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def warn(self, message: str) -> None:
        """Write a warning, without secrets and absolute paths."""
        self.add(Warned(self.step, without_secrets(without_absolute_paths(message))))

    def status(self, status: Status, reason: str = "") -> None:
        """Write how the run goes on, or ends."""
        self.add(StatusChanged(self.step, status, without_secrets(without_absolute_paths(reason))))


def read_events(run: RunDirectory) -> list[Event]:
    """Every event of the run; empty before the first. CheckpointError names a damaged line."""
    return read_lines(run.events, parse_event)


def follow_events(
    run: RunDirectory, poll_seconds: float = 0.5, wait: Callable[[float], None] = time.sleep
) -> Iterator[Event]:
    """Every event of the run: those that were, then each new one, until no process writes to the run any more.

    A resumed run replaces the file by one that ends at its checkpoint; the steps done again are then told again.
    """
    reader = EventReader(run.events)
    while True:
        running = run.is_running()  # asked before reading, so that the last lines are not missed
        yield from reader.new_events()
        if not running:
            return
        wait(poll_seconds)


class EventReader:
    """How much of a growing file has been read, which may be replaced by a shorter one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode, self._bytes, self._told = 0, 0, set[int]()

    def new_events(self) -> Iterator[Event]:
        """The events of the lines that are new and whole; what a run does not write is passed over."""
        try:
            file = self.path.open("rb")
        except OSError:
            return
        with file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:  # another file: what it still holds of the earlier one is known
                self._inode, self._bytes = inode, 0
            file.seek(self._bytes)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._bytes += len(whole) + len(newline)
        for line in whole.split(b"\n"):
            if hash(line) in self._told:
                continue
            self._told.add(hash(line))
            try:
                event = parse_event(line)
            except ValueError:
                continue
            yield event


def best_so_far(event: Evaluated) -> str:
    """`best so far`, or which step was better; nothing for scores before and after training."""
    if event.metric is None or event.best_step is None:
        return ""
    return "best so far" if event.best_step == event.step else f"best was step {event.best_step}"


def shown_scores(scores: Mapping[str, float | None], metric: str | None) -> list[tuple[str, float]]:
    """The scores that a line has room for: the one that chooses, and loss, token accuracy and exact match."""
    wanted = dict.fromkeys([metric or "loss", "loss", "token_accuracy", "exact_match"])
    return [(name, value) for name in wanted if (value := scores.get(name)) is not None]
