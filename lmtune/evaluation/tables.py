"""What a terminal shows of two models that were compared."""

from __future__ import annotations

from rich.table import Table

from lmtune.evaluation.compare import Comparison
from lmtune.io.console import escape
from lmtune.io.text import pluralize


def comparison_table(first: str, second: str, compared: Comparison) -> Table:
    """Both models' scores, their difference with its 95 % interval, and on how many rows the second is better."""
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for title in (first, second, "difference (95 %)", "better / worse / same"):
        table.add_column(escape(title), justify="right", overflow="fold")
    for name, found in compared.differences.items():
        one, other = compared.scores[name]
        factor, digits = (1, 4) if name == "loss" else (100, 1)
        sign = -1 if name == "loss" else 1
        low, high = sorted(sign * factor * edge for edge in found.interval)
        color = {"better": "green", "worse": "red"}.get(found.verdict, "dim")
        apart = f"{sign * factor * found.value:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
        cells = [name, *(f"{factor * score:.{digits}f}{' %' * (factor == 100)}" for score in (one, other))]
        table.add_row(*cells, f"[{color}]{apart}[/]", f"{found.wins} / {found.losses} / {found.ties}")
    return table


def describe_worse(compared: Comparison, count: int) -> list[str]:
    """The rows on which the second model is worse than the first, the worst first; lines with markup."""
    worse = [row for row in compared.rows if row.gain < 0]
    if not worse or not count:
        return []
    lines = [f"\n{pluralize(len(worse))} got worse" + (f"; the worst {count}:" if len(worse) > count else ":")]
    for row in worse[:count]:
        lines.append(f"[bold]{escape(row.first.location)}[/]  {escape(row.first.question.strip())}")
        if row.first.answer is None or row.second.answer is None:
            continue
        said = (("reference", row.first.reference), ("first", row.first.answer), ("second", row.second.answer))
        lines += [f"  {name + ':':<10} {escape(text.strip() or '(nothing)')}" for name, text in said]
    return lines
