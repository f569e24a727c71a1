"""What `lmtune ensemble` shows: each member, all together, and whether that is better than the best of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from rich.table import Table

from lmtune.io.console import escape
from lmtune.runs.tables import format_score, names_of
from lmtune.search.ensemble import EnsembleScores, Gain, Scored


def describe(scores: EnsembleScores) -> Iterator[Table | str]:
    """A table, and a sentence for each comparison."""
    rows = [*scores.members, scores.together, *([scores.combined] if scores.combined else [])]
    values = [one.rows.scores.as_dict() for one in rows]
    names = {key: name for key, name in names_of(*values).items() if any(one.get(key) is not None for one in values)}
    if scores.metric not in names and "accuracy" not in names:
        names[scores.metric] = "Accuracy"
    table = Table(box=None, pad_edge=False)
    for title in ("", "weight", *names.values()):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for one, own in zip(rows, values, strict=True):
        style = "bold" if one is scores.together else None
        weight = "" if one.weight is None else f"{one.weight:.3f}"
        table.add_row(escape(one.name), weight, *(format_score(key, own.get(key)) for key in names), style=style)
    yield table
    for first, second, gain in _compared(scores):
        yield escape(f"{gain.difference.sentence(f'{second.name} beside {first.name}')} ({_figures(gain)})")


def as_dict(scores: EnsembleScores) -> dict[str, object]:
    """For `--json`."""
    gains = {
        f"{second.name} beside {first.name}": {
            "metric": gain.metric, "first": gain.first, "second": gain.second, **asdict(gain.difference),
            "verdict": gain.difference.verdict,
        }
        for first, second, gain in _compared(scores)
    }  # fmt: skip
    return {
        "members": [{"name": one.name, "weight": one.weight, **one.rows.scores.as_dict()} for one in scores.members],
        "ensemble": scores.together.rows.scores.as_dict(),
        "best": scores.best.name,
        "combined": scores.combined and {"name": scores.combined.name, **scores.combined.rows.scores.as_dict()},
        "differences": gains,
    }


def _compared(scores: EnsembleScores) -> Iterator[tuple[Scored, Scored, Gain]]:
    pairs = [(scores.best, scores.together)]
    if scores.combined is not None:
        pairs += [(scores.together, scores.combined), (scores.best, scores.combined)]
    for first, second in pairs:
        yield first, second, scores.beside(first, second)


def _figures(gain: Gain) -> str:
    name, factor, digits, unit = ("loss", -1, 4, "") if gain.metric == "loss" else ("accuracy", 100, 1, " points")
    low, high = sorted(factor * edge for edge in gain.difference.interval)
    value = factor * gain.difference.value
    return f"{name} {value:+.{digits}f}{unit}, 95 %: {low:+.{digits}f} to {high:+.{digits}f}"
