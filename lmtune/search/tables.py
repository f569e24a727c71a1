"""What a terminal shows of a search: folds with their spread, trials with their settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rich.table import Table

from lmtune.config.metrics import direction_of
from lmtune.io.console import escape
from lmtune.io.text import pluralize
from lmtune.runs.tables import SHARES, format_score, names_of
from lmtune.search.crossval import CrossValidation, Spread, verdict
from lmtune.search.results import SweepResult
from lmtune.search.space import short


def crossval_tables(
    result: CrossValidation, apart: Mapping[str, Spread], other: CrossValidation | None = None
) -> list[Table]:
    """The scores of each fold; mean, deviation and interval of each score; and how far it is above that of `other`.

    Three tables and not one: a terminal of 80 columns shows each whole.
    """
    known = names_of({name: spread.mean for name, spread in result.tuned.items()})
    names = {name: known[name] for name in result.tuned if name in known}
    folds = _plain_table(*names.values())
    for number in range(result.folds):
        folds.add_row(f"fold {number + 1}", *(format_score(name, result.tuned[name].values[number]) for name in names))
    means = _plain_table(*(["base"] if result.base else []), "mean", "±", "95 %")
    for name, title in names.items():
        spread, base = result.tuned[name], result.base.get(name)
        cells = [format_score(name, base.mean if base else None)] if result.base else []
        cells += [f"[bold]{format_score(name, spread.mean)}[/]", format_score(name, spread.deviation)]
        means.add_row(title, *cells, _range(name, _possible(name, spread)))
    if other is None:
        return [folds, means]
    above = _plain_table(escape(f"above {other.name}"), "95 %")
    for name, title in names.items():
        if (found := apart.get(name)) is not None:
            above.add_row(title, format_score(name, found.mean), _range(name, found))
    return [folds, means, above]


def _plain_table(*titles: str) -> Table:
    """Columns of numbers behind their names."""
    table = Table(box=None, pad_edge=False)
    for title in ("", *titles):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    return table


def _possible(name: str, spread: Spread) -> Spread:
    """The interval within what the score can be: few folds reach beyond it."""
    is_share = name in SHARES or name.endswith("accuracy") or name in ("macro_f1", "auc")
    low = max(0.0, spread.low) if is_share or direction_of(name) == "min" else spread.low
    return replace(spread, low=low, high=min(1.0, spread.high) if is_share else spread.high)


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
    for title in ("trial", result.metric, *_short_names(keys), "steps", "seconds"):
        table.add_column(escape(title), justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, overflow="ellipsis")
    for one in ranked[:most]:
        style = "bold" if one.number == result.best else None
        score = format_score(result.metric, one.score) if one.score is not None else one.status
        counts = ["" if value is None else f"{value:,.0f}" for value in (one.steps, one.seconds)]
        settings = [escape(short(one.values.get(key, ""))) for key in keys]
        table.add_row(str(one.number), score, *settings, *counts, escape(one.reason), style=style)
    return table


def _short_names(keys: Sequence[str]) -> list[str]:
    """`learning_rate` for `train.learning_rate`, where no other key ends so."""
    ends = [key.rpartition(".")[2] for key in keys]
    return [end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)]


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
