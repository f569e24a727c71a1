"""Reading runs back: which there are, how each went, and the steps of one that is under way.

    for run in list_runs("runs"):
        print(run.name, run.status, run.tuned_exact_match)

Everything here only reads, imports nothing heavy, and takes what it finds: a run that was killed, or is half written at
this moment, is shown as far as it got.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from lmtune.config.yaml import read_yaml
from lmtune.errors import LmtuneError, ModelError
from lmtune.io.text import is_finite_number
from lmtune.runs.store import RunDirectory, find_run, run_folders, run_hint

_TOLD = ("step", "epoch", "loss", "tokens", "seconds")  # of a step, to a person
_RECENT_STEPS = 20
_TAIL_BYTES = 65_536  # holds the last line of metrics.jsonl many times over


@dataclass(frozen=True)
class Overview:
    """One run in a line.

    Attributes:
        name: its folder's name.
        status: complete, running, interrupted, failed, or damaged.
        model, quantization: the base.
        steps, loss: the last step done and its loss; None before the first. One step's loss is that of its rows.
        recent_loss: the mean over the trained tokens of the last 20 steps.
        validation_loss: of the held-out rows, with the saved adapter; None before the end.
        base_exact_match, tuned_exact_match: shares of held-out rows answered rightly; None if not measured.
        changed: when a file of the run was last written, local time.
    """

    name: str
    status: str
    model: str
    quantization: str
    steps: int | None
    loss: float | None
    base_exact_match: float | None
    tuned_exact_match: float | None
    changed: datetime
    recent_loss: float | None = None
    validation_loss: float | None = None


def choose_run(target: str, runs_dir: str | Path = "runs") -> RunDirectory:
    """The run that `target` names, as a path or a name in `runs_dir`.

    Raises:
        ModelError: there is none; names the nearest ones.
    """
    run = find_run(target, runs_dir)
    if run is not None:
        return run
    raise ModelError(f"{target}: no such run; {run_hint(target, runs_dir)}")


def list_runs(runs_dir: str | Path = "runs") -> list[Overview]:
    """Every run in a folder, the one written to last first."""
    runs = [overview(RunDirectory(path)) for path in run_folders(runs_dir)]
    return sorted(runs, key=lambda run: run.changed, reverse=True)


def overview(run: RunDirectory) -> Overview:
    """One run in a line; damaged files are told as status `damaged`, not raised."""
    status, summary, model = "damaged", dict[str, Any](), dict[str, Any]()
    with contextlib.suppress(LmtuneError):
        named = read_yaml(run.config).get("model")
        model = named if isinstance(named, dict) else {}
        summary = run.read_summary()
        status = run_status(run, summary)
    steps = last_steps(run, _RECENT_STEPS)
    last = steps[-1] if steps else {}
    return Overview(
        run.name, status, str(model.get("name", "?")), str(model.get("quantization", "?")),
        last.get("step", summary.get("steps")), last.get("loss"), _score(summary, "base"), _score(summary, "tuned"),
        datetime.fromtimestamp(_last_written(run)), _mean_loss(steps), _score(summary, "tuned", "loss"),
    )  # fmt: skip


def run_status(run: RunDirectory, summary: Mapping[str, Any]) -> str:
    """What `summary.json` says; but a run that says "running" and is held by no process was killed: interrupted."""
    status = str(summary.get("status", "running"))
    return "interrupted" if status == "running" and not is_running(run) else status


def is_running(run: RunDirectory) -> bool:
    """Whether a process holds the run's lock at this moment."""
    return run.is_held()


def run_tree(run: RunDirectory) -> dict[str, Any]:
    """One run as `lmtune runs show --json` gives it: name, status, changed, summary, settings, data.

    Raises:
        LmtuneError: a file of the run is damaged.
    """
    item = overview(run)
    return {
        **overview_tree(item), "summary": run.read_summary(), "settings": read_yaml(run.config),
        "data": run.read_json(run.data),
    }  # fmt: skip


def overview_tree(item: Overview) -> dict[str, Any]:
    """One run of `lmtune runs list --json`: the attributes of `Overview`, the time in ISO 8601."""
    return {**asdict(item), "changed": item.changed.astimezone().isoformat(timespec="seconds")}


def results_tree(run: RunDirectory) -> list[dict[str, Any]]:
    """`results.csv` as a list of rows: numbers, and null where a row has none."""
    import csv

    with run.results.open(encoding="utf-8", newline="") as file:
        return [{key: _number(text) for key, text in row.items()} for row in csv.DictReader(file)]


def last_step(run: RunDirectory) -> dict[str, Any]:
    """The last whole line of `metrics.jsonl`, or `{}`; reads the file's end only."""
    return next(iter(last_steps(run, 1)), {})


def last_steps(run: RunDirectory, count: int) -> list[dict[str, Any]]:
    """The last `count` whole lines of `metrics.jsonl`, oldest first; reads the file's end only."""
    if not run.metrics.is_file():
        return []
    try:
        with run.metrics.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    found: list[dict[str, Any]] = []
    for line in reversed(lines[:-1]):  # after the last newline comes nothing, or half a line
        if len(found) < count and (step := _parsed(line)) is not None:
            found.append(step)
    return found[::-1]


def _mean_loss(steps: Sequence[Mapping[str, Any]]) -> float | None:
    """The loss of a trained token over several steps."""
    counts: list[float] = []
    for step in steps:
        tokens: Any = step.get("trained_tokens")
        counts.append(tokens if is_finite_number(tokens) and tokens > 0 else 1)
    total = sum(step["loss"] * count for step, count in zip(steps, counts, strict=True))
    return float(total / sum(counts)) if counts else None


def follow_steps(
    run: RunDirectory, poll_seconds: float = 0.5, wait: Callable[[float], None] = time.sleep
) -> Iterator[dict[str, Any]]:
    """Every step of the run: those done, then each new one, until no process holds the run any more.

    A resumed run replaces the file by one that ends at its checkpoint; the steps done again are then told again.
    """
    reader = _GrowingFile(run.metrics)
    while True:
        running = is_running(run)  # asked before reading, so that the last lines are not missed
        for line in reader.new_lines():
            if (step := _parsed(line)) is not None:
                yield step
        if not running:
            return
        wait(poll_seconds)


class _GrowingFile:
    """Gives the lines added since the last look; the file may be replaced by its own beginning and grow again."""

    def __init__(self, path: Path) -> None:
        self._path, self._inode, self._offset, self._told = path, 0, 0, 0

    def new_lines(self) -> list[bytes]:
        if not self._path.is_file():
            return []
        try:
            with self._path.open("rb") as file:
                return self._read(file, os.fstat(file.fileno()))
        except FileNotFoundError:
            return []

    def _read(self, file: BinaryIO, now: os.stat_result) -> list[bytes]:
        replaced = now.st_ino != self._inode or now.st_size < self._offset
        file.seek(0 if replaced else self._offset)
        lines = file.read().split(b"\n")
        self._inode, self._offset = now.st_ino, file.tell() - len(lines.pop())  # a last line half written waits
        if replaced:
            self._told, lines = len(lines), lines[self._told :]
        else:
            self._told += len(lines)
        return lines


def _parsed(line: bytes) -> dict[str, Any] | None:
    """What a line of `metrics.jsonl` tells; None if it is not one that a run writes."""
    try:
        step = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(step, dict) and all(is_finite_number(step.get(key)) for key in _TOLD)
    return step if whole else None


def _number(text: str | None) -> int | float | str | None:
    for kind in (int, float):
        with contextlib.suppress(TypeError, ValueError):
            number: int | float = kind(text)  # type: ignore[arg-type]
            return number if math.isfinite(number) else None
    return text or None


def _score(summary: Mapping[str, Any], which: str, name: str = "exact_match") -> float | None:
    value = (summary.get(which) or {}).get(name)
    return float(value) if isinstance(value, (int, float)) else None


def _last_written(run: RunDirectory) -> float:
    files = (run.config, run.summary, run.metrics)
    return max(path.stat().st_mtime for path in files if path.is_file())
