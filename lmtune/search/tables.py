"""What a terminal shows of a search: folds with their spread, trials with their settings."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from lmtune.io.console import escape
from lmtune.io.text import pluralize
from lmtune.runs.tables import format_score, names_of
from lmtune.search.crossval import CrossValidation, Spread, verdict
from lmtune.search.results import SweepResult
from lmtune.search.space import short


def crossval_table(result: CrossValidation, apart: Mapping[str, Spread], other: CrossValidation | None = None) -> Table:
    """A line for each score: base, folds, mean, deviation, interval; and how far it is above that of `other`."""
    table = Table(box=None, pad_edge=False)
    titles = [*(["base"] if result.base else []), *(f"fold {n + 1}" for n in range(result.folds)), "mean", "±", "95 %"]
    if other is not None:
        titles.append(f"above {other.name} (95 %)")
    for title in ("", *titles):
        table.add_column(escape(title), justify="right" if title else "left", no_wrap=True)
    names = names_of({name: spread.mean for name, spread in result.tuned.items()})
    for name, spread in result.tuned.items():
        if name not in names:
            continue
        base = result.base.get(name)
        cells = [format_score(name, base.mean if base else None)] if result.base else []
        cells += [format_score(name, value) for value in spread.values]
        cells += [
            f"[bold]{format_score(name, spread.mean)}[/]",
            format_score(name, spread.deviation),
            _range(name, spread),
        ]
        if (found := apart.get(name)) is not None:
            cells.append(f"{format_score(name, found.mean)} ({_range(name, found)})")
        table.add_row(names[name], *cells)
    return table


def crossval_sentence(result: CrossValidation, apart: Mapping[str, Spread], other: CrossValidation) -> str:
    """Which of two cross-validations is better, in words."""
    name, found = result.metric, apart[result.metric]
    told = verdict(name, found)
    if told == "not told apart":
        return f"by {name}, {result.name} and {other.name} are not told apart; more rows or repetitions would tell"
    return f"by {name}, {result.name} is {told} than {other.name}"


def _range(name: str, spread: Spread) -> str:
    return f"{format_score(name, spread.low)} to {format_score(name, spread.high)}"


def sweep_table(result: SweepResult, most: int = 15) -> Table:
    """The best trials first, with their settings."""
    table = Table(box=None, pad_edge=False)
    ranked = result.ranked
    keys = list(ranked[0].values) if ranked else []
    for title in ("trial", result.metric, *keys, "steps", "seconds", ""):
        table.add_column(escape(title), justify="left" if title in ("", *keys) else "right")
    for one in ranked[:most]:
        style = "bold" if one.number == result.best else None
        score = format_score(result.metric, one.score) if one.score is not None else one.status
        counts = ["" if value is None else f"{value:,.0f}" for value in (one.steps, one.seconds)]
        settings = [escape(short(one.values.get(key, ""))) for key in keys]
        table.add_row(str(one.number), score, *settings, *counts, escape(one.reason), style=style)
    return table


def describe_sweep(result: SweepResult, most: int = 15) -> list[str]:
    """How many trials there are, and which settings matter."""
    counts: dict[str, int] = {}
    for one in result.trials:
        counts[one.status] = counts.get(one.status, 0) + 1
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    lines = [f"{pluralize(len(result.trials), 'trial')}: {told}"]
    if len(result.trials) > most:
        lines[0] += f"; the best {most} are shown"
    if result.importances:
        shares = ", ".join(f"{key} {100 * share:.0f} %" for key, share in result.importances.items())
        lines.append(f"what {result.metric} depends on: {shares}")
    return lines
