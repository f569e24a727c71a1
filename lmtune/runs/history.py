"""Which runs there are, and how each went.

    for run in list_runs("runs"):
        print(run.name, run.status, run.tuned_exact_match)

Everything here only reads, imports nothing heavy, and takes what it finds: a run that was killed, or is half written at
this moment, is shown as far as it got.
"""

from __future__ import annotations

import contextlib
import csv
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from lmtune.config.metrics import GENERATED
from lmtune.config.yaml import read_yaml
from lmtune.errors import LmtuneError
from lmtune.runs.log import StepRecord, last_steps
from lmtune.runs.store import RunDirectory, ScoreValues, Summary, run_folders

_RECENT_STEPS = 20
_TOLD = (GENERATED, "accuracy", "pair_accuracy", "mean_absolute_error", "loss")  # the first that a run has is shown


@dataclass(frozen=True)
class Overview:
    """One run in a line; None is not measured, or not yet."""

    name: str
    status: str  # complete, running, interrupted, failed, or damaged
    model: str
    quantization: str
    steps: int | None  # done
    loss: float | None  # of the last step
    base_exact_match: float | None
    tuned_exact_match: float | None
    changed: datetime  # when a file of the run was last written, local time
    recent_loss: float | None = None  # the mean over the trained tokens of the last 20 steps
    validation_loss: float | None = None  # with the saved adapter
    metric: str | None = None  # which score tells most of such a run: exact_match, accuracy, …
    base_score: float | None = None
    tuned_score: float | None = None


def list_runs(runs_dir: str | Path = "runs") -> list[Overview]:
    """Every run in a folder, the one written to last first; the runs of a search as `NAME/trial-000`."""
    folder = Path(runs_dir)
    runs = [] if not folder.is_dir() else [
        replace(overview(RunDirectory(path)), name=path.relative_to(folder).as_posix())
        for above in sorted(folder.iterdir())
        for path in (*([above] if _is_run(above) else []), *run_folders(above))
    ]  # fmt: skip
    return sorted(runs, key=lambda run: run.changed, reverse=True)


def _is_run(folder: Path) -> bool:
    """Whether a run was begun in a folder; one of several runs may keep their common settings in it."""
    run = RunDirectory(folder)
    return run.exists() and (run.summary.is_file() or not run_folders(folder))


@dataclass(frozen=True)
class RunGroup:
    """The runs in one folder below that of the runs: trials, folds or members.

    Attributes:
        runs: the best by validation loss first, those without one last.
    """

    name: str
    runs: tuple[Overview, ...]

    @property
    def status(self) -> str:
        """`18 complete, 2 failed`."""
        return ", ".join(f"{count} {status}" for status, count in Counter(run.status for run in self.runs).items())


def grouped(runs: Sequence[Overview]) -> list[Overview | RunGroup]:
    """The runs in their order, those in a folder of their own as one group where the first of them stands."""
    items: dict[str, list[Overview]] = {}
    for run in runs:
        items.setdefault(run.name.rpartition("/")[0] + "/" if "/" in run.name else run.name, []).append(run)
    return [
        RunGroup(name, tuple(sorted(found, key=_by_loss))) if name.endswith("/") else found[0]
        for name, found in items.items()
    ]


def _by_loss(run: Overview) -> tuple[bool, float, str]:
    return (run.validation_loss is None, run.validation_loss or 0.0, run.name)


def overview(run: RunDirectory) -> Overview:
    """One run in a line; damaged files are told as status `damaged`, not raised."""
    status, summary, model = "damaged", Summary(), {}
    with contextlib.suppress(LmtuneError):
        named = read_yaml(run.config).get("model")
        model = named if isinstance(named, dict) else {}
        summary = run.read_summary()
        status = run_status(run, summary)
    steps = last_steps(run, _RECENT_STEPS)
    files = (run.config, run.summary, run.metrics)
    scores = [part for part in (summary.tuned, summary.base) if part is not None]
    metric = next((name for name in _TOLD for part in scores if part.get(name) is not None), None)
    return Overview(
        run.name, status, str(model.get("name", "?")), str(model.get("quantization", "?")),
        steps[-1].step if steps else summary.steps, steps[-1].loss if steps else None,
        _score(summary.base), _score(summary.tuned),
        datetime.fromtimestamp(max(path.stat().st_mtime for path in files if path.is_file())),
        _mean_loss(steps), _score(summary.tuned, "loss"),
        metric, _score(summary.base, metric), _score(summary.tuned, metric),
    )  # fmt: skip


def run_status(run: RunDirectory, summary: Summary) -> str:
    """What `summary.json` says; but one that says "running" and is held by no process was killed: interrupted."""
    return "interrupted" if summary.status == "running" and not run.is_running() else summary.status


def run_tree(run: RunDirectory) -> dict[str, object]:
    """One run as `lmtune runs show --json` gives it; LmtuneError if a file of the run is damaged."""
    return {
        **overview_tree(overview(run)), "summary": run.read_summary().tree, "settings": read_yaml(run.config),
        "data": run.read_json(run.data),
    }  # fmt: skip


def overview_tree(item: Overview) -> dict[str, object]:
    """One run of `lmtune runs list --json`: the attributes of `Overview`, the time in ISO 8601."""
    return {**asdict(item), "changed": item.changed.astimezone().isoformat(timespec="seconds")}


def results_tree(run: RunDirectory) -> list[dict[str, int | float | str | None]]:
    """`results.csv` as a list of rows: numbers, and null where a row has none."""
    with run.results.open(encoding="utf-8", newline="") as file:
        return [{key: _number(text) for key, text in row.items()} for row in csv.DictReader(file)]


def _number(text: str | None) -> int | float | str | None:
    for kind in (int, float):
        with contextlib.suppress(TypeError, ValueError):
            number: int | float = kind(text)  # type: ignore[arg-type]
            return number if math.isfinite(number) else None
    return text or None


def _mean_loss(steps: Sequence[StepRecord]) -> float | None:
    """The loss of a trained token over several steps; where rows are trained on as a whole, the mean of the steps."""
    tokens = sum(step.trained_tokens for step in steps)
    if not tokens:
        return sum(step.loss for step in steps) / len(steps) if steps else None
    return sum(step.loss * step.trained_tokens for step in steps) / tokens


def _score(scores: ScoreValues | None, name: str | None = GENERATED) -> float | None:
    return None if scores is None or name is None else scores.get(name)
