"""Several runs beside each other: in which settings they differ, what they scored, what they cost.

found = compare_runs([RunDirectory("runs/a"), RunDirectory("runs/b")])
found.settings["train.learning_rate"]       # (0.0002, 0.001)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from lmtune.config.metrics import direction_of
from lmtune.config.yaml import read_yaml
from lmtune.runs.history import run_status
from lmtune.runs.log import last_steps
from lmtune.runs.store import RunDirectory, Summary

_OF_EACH = ("run.name",)  # differs always
_FIGURES = (
    "steps", "best_step", "train_seconds", "tokens_per_second", "peak_memory_gib", "estimated_memory_gib",
    "trainable_parameters",
)  # fmt: skip
# Of these neither a high nor a low value is the better one.
_NEITHER = re.compile(r"kl|(logprob|length)_.*|reward_(un)?desirable|reward_(chosen|rejected)")
_COUNTS = ("rows", "exact_match_rows")


@dataclass(frozen=True)
class Comparison:
    """What is told of N runs; each tuple is `[N]`, None where a run has no such value.

    Attributes:
        settings: by `section.key`, those that differ.
        base, tuned: scores by name.
        figures: of cost, by their key in `summary.json`.
        notes: what makes the scores no fair comparison.
    """

    runs: tuple[str, ...]
    status: tuple[str, ...]
    settings: Mapping[str, tuple[object, ...]]
    base: Mapping[str, tuple[float | None, ...]]
    tuned: Mapping[str, tuple[float | None, ...]]
    figures: Mapping[str, tuple[float | None, ...]]
    notes: tuple[str, ...]

    def tree(self) -> dict[str, object]:
        """As JSON."""
        return asdict(self)


def compare_runs(runs: Sequence[RunDirectory]) -> Comparison:
    """Read the runs; LmtuneError if a file of one is damaged."""
    summaries = [run.read_summary() for run in runs]
    settings = [settings_of(run) for run in runs]
    keys = dict.fromkeys(key for one in settings for key in one)
    different = {key: tuple(one.get(key) for one in settings) for key in keys if key not in _OF_EACH}
    return Comparison(
        runs=tuple(run.name for run in runs) if len({run.name for run in runs}) == len(runs)
        else tuple(str(run.path) for run in runs),
        status=tuple(run_status(run, summary) for run, summary in zip(runs, summaries, strict=True)),
        settings={key: values for key, values in different.items() if any(value != values[0] for value in values)},
        base=_scores([summary.base for summary in summaries]),
        tuned=_scores([summary.tuned for summary in summaries]),
        figures=_figures(runs, summaries),
        notes=_notes(runs, settings),
    )  # fmt: skip


def settings_of(run: RunDirectory) -> dict[str, object]:
    """The settings of a run by `section.key`."""
    flat: dict[str, object] = {}
    for section, values in read_yaml(run.config).items():
        if isinstance(values, dict):
            flat.update({f"{section}.{key}": value for key, value in values.items()})
        else:
            flat[section] = values
    return flat


def shown_setting(value: object) -> str:
    """A setting as a config writes it: `[tensorboard, trackio]`; a dash where a run has none."""
    return "–" if value is None else _as_yaml(value)


def _as_yaml(value: object) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_as_yaml(one)}' for key, one in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_as_yaml, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def best_of(name: str, values: Sequence[float | None]) -> int | None:
    """Which of several scores is the best; None where that is not known, or they are equal."""
    known = [value for value in values if value is not None]
    if len(set(known)) < 2 or name in _COUNTS or _NEITHER.fullmatch(name):
        return None
    best = min(known) if direction_of(name) == "min" else max(known)
    return values.index(best) if values.count(best) == 1 else None


def _scores(of_runs: Sequence[Mapping[str, float | None] | None]) -> dict[str, tuple[float | None, ...]]:
    names = dict.fromkeys(name for one in of_runs for name in one or {})
    found = {name: tuple((one or {}).get(name) for one in of_runs) for name in names}
    return {name: values for name, values in found.items() if any(value is not None for value in values)}


def _figures(runs: Sequence[RunDirectory], summaries: Sequence[Summary]) -> dict[str, tuple[float | None, ...]]:
    found: dict[str, tuple[float | None, ...]]
    found = {name: tuple(summary.figures.get(name) for summary in summaries) for name in _FIGURES}
    # one that has not ended has its steps in its records only
    found["steps"] = tuple(
        next((one.step for one in last_steps(run, 1)), None) if steps is None else steps
        for run, steps in zip(runs, found["steps"], strict=True)
    )
    return {name: values for name, values in found.items() if any(value is not None for value in values)}


def _notes(runs: Sequence[RunDirectory], settings: Sequence[Mapping[str, object]]) -> tuple[str, ...]:
    """Whether the runs were scored on the same rows, as far as their files tell."""
    held_out = []
    for run, own in zip(runs, settings, strict=True):
        report = run.read_json(run.data)
        validation, train = report.get("validation"), report.get("train")
        split = isinstance(validation, dict) and "held_out" in validation  # drawn from the training files by the seed
        source = train if split else validation
        files = source.get("sha256") if isinstance(source, dict) else None
        count = validation.get("held_out") if split and isinstance(validation, dict) else None
        held_out.append((files, count, own.get("train.seed") if split else None))
    if any(one != held_out[0] for one in held_out):
        return ("the runs were scored on different held-out rows; `lmtune compare` scores two on the same rows",)
    return ()
