"""The pictures of a sweep: scores in the order of trials, which key matters, and which values go together."""

from __future__ import annotations

from pathlib import Path

from lmtune.io.atomic import write_text
from lmtune.runs.plots import Axis, Curve, bars_svg, curves_svg, parallel_svg
from lmtune.search.results import SweepResult, TrialResult
from lmtune.search.space import Choice, Space, shown

HISTORY, IMPORTANCE, PARALLEL = "history.svg", "importance.svg", "coordinates.svg"


def write_pictures(folder: Path, space: Space, result: SweepResult) -> None:
    """Write those for which there are trials enough."""
    done = [one for one in result.trials if one.score is not None]
    if done:
        write_text(folder / HISTORY, history_svg(result))
        write_text(folder / PARALLEL, parallel_coordinates_svg(space, result))
    if result.importances:
        names = list(result.importances)
        title = f"{result.name}: share of each setting in how far {result.metric} differs"
        write_text(folder / IMPORTANCE, bars_svg(title, names, [result.importances[name] for name in names]))


def history_svg(result: SweepResult) -> str:
    """The score of each trial, and the best so far."""
    done = [one for one in result.trials if one.score is not None]
    points = [(float(one.number), one.score or 0.0, _said(one)) for one in done]
    best, steps = None, list[tuple[float, float, str]]()
    for number, score, said in points:
        is_better = best is None or (score < best if result.direction == "min" else score > best)
        before, best = best, score if is_better else best
        if is_better and before is not None:
            steps.append((number, before, said))
        steps.append((number, best if best is not None else score, said))
    across = Axis.of("trial", [number for number, _, _ in points])
    up = Axis.of(result.metric, [score for _, score, _ in points])
    curves = [Curve("trials", points, is_line=False), Curve("best so far", steps, is_strong=True)]
    left = len(result.trials) - len(done)
    note = f" ({left} that did not end are not shown)" if left else ""
    return curves_svg(f"{result.name}: {result.metric} of each trial{note}", across, up, curves)


def parallel_coordinates_svg(space: Space, result: SweepResult) -> str:
    """A line for each trial through its values and its score; the darker, the better."""
    done = list(reversed([one for one in result.ranked if one.score is not None]))
    axes = [_axis(choice) for choice in space.choices]
    axes.append(Axis.of(result.metric, [one.score or 0.0 for one in done]))
    lines = []
    for rank, one in enumerate(done):
        values = [_place(choice, one.values[choice.key]) for choice in space.choices]
        lines.append(([*values, one.score or 0.0], (rank + 1) / len(done), _said(one)))
    return parallel_svg(f"{result.name}: settings and {result.metric}; darker is better", axes, lines)


def _axis(choice: Choice) -> Axis:
    if choice.values:
        return Axis.of_names(choice.key, choice.values)
    return Axis(choice.key, choice.low, choice.high, choice.is_log)


def _place(choice: Choice, value: str) -> float:
    return float(choice.values.index(value)) if choice.values else float(value)


def _said(trial: TrialResult) -> str:
    score = "" if trial.score is None else f": {trial.score:.4f}"
    return f"trial {trial.number}{score}; {shown(trial.values)}"
