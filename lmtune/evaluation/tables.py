"""What a terminal shows of scores with their intervals, of two models beside each other, and of slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from lmtune.evaluation.compare import ComparedRow, Comparison, Slice
from lmtune.evaluation.intervals import Difference, Interval
from lmtune.evaluation.results import ScoreOfRows
from lmtune.io.console import escape
from lmtune.io.text import pluralize
from lmtune.runs.tables import SCORES, format_score, names_of

_MOST_SLICES = 20
_PLAIN = ("loss", "mean_absolute_error", "squared_error")  # no shares
_BESIDE = ("difference (95 %)", "better /\nworse / same")  # a narrow terminal folds the names, not these
Cell = tuple[float | None, Interval | None]


def shown_score(name: str, value: float) -> str:
    """A score of generated answers, of rows or of tokens: in percent, but for those that are no shares."""
    return f"{value:.4f}" if name in _PLAIN else f"{100 * value:.1f} %"


def difference_cells(name: str, found: Difference) -> list[str]:
    """The difference with its 95 % interval, coloured, and on how many rows the second is better."""
    factor, digits, sign = (1, 4, -1) if name in _PLAIN else (100, 1, 1)
    low, high = sorted(sign * factor * edge for edge in found.interval)
    color = {"better": "green", "worse": "red"}.get(found.verdict, "dim")
    apart = f"{sign * factor * found.value:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    return [f"[{color}]{apart}[/]", f"{found.wins} / {found.losses} / {found.ties}"]


def comparison_table(first: str, second: str, compared: Comparison) -> Table:
    """Both models' scores, their difference with its 95 % interval, and on how many rows the second is better."""
    table = plain_table(first, second, *_BESIDE)
    for name, found in compared.differences.items():
        table.add_row(name, *(shown_score(name, one) for one in compared.scores[name]), *difference_cells(name, found))
    return table


def evaluation_table(base: Mapping[str, Cell] | None, tuned: Mapping[str, Cell], shares: Sequence[str] = ()) -> Table:
    """Each score with its 95 % interval, base beside tuned; `shares` are those of generated answers."""
    table = plain_table(*(() if base is None else ("base (95 %)",)), "score (95 %)" if base is None else "tuned (95 %)")
    values = [{name: value for name, (value, _) in part.items()} for part in (base or {}, tuned)]
    names = {**names_of(*values), **{name: name for name in shares if name in tuned}}
    if not values[-1].keys() & SCORES.keys():  # answers from a file
        names = {name: name for name in tuned}
    for name, title in names.items():
        cells = [
            _cell(name, part.get(name, (None, None)), name in shares) for part in (base, tuned) if part is not None
        ]
        table.add_row(escape(title), *cells)
    return table


def _cell(name: str, found: Cell, is_share: bool) -> str:
    def shown(one: float | None) -> str:
        return shown_score(name, one) if is_share and one is not None else format_score(name, one)

    value, interval = found
    if interval is None or value is None:
        return shown(value)
    return f"[bold]{shown(value)}[/] ({shown(interval.low).removesuffix(' %')} to {shown(interval.high)})"


def slices_table(slices: Sequence[Slice], by: str, second: str = "tuned", first: str = "base") -> Table | None:
    """The deciding score of each slice; None if there are no slices."""
    if not slices:
        return None
    known = [one.compared for one in slices if one.compared is not None]
    compared = max(known, key=lambda one: len(one.differences), default=None)  # some slices may have no answers
    deciding = compared.deciding if compared else next(iter(max(slices, key=lambda one: len(one.scores)).scores))
    beside = () if compared is None else (first, second, *_BESIDE)
    table = plain_table("rows", *(beside or (f"{deciding} (95 %)",)), head=by)
    for one in slices[:_MOST_SLICES]:
        cells = [escape(one.name), str(one.rows)]
        if compared is None:
            cells.append(_score_cell(deciding, one.scores.get(deciding)))
        elif one.compared is not None and deciding in one.compared.differences:
            cells += [shown_score(deciding, value) for value in one.compared.scores[deciding]]
            cells += difference_cells(deciding, one.compared.differences[deciding])
        table.add_row(*cells)
    if len(slices) > _MOST_SLICES:
        table.caption = f"… and {pluralize(len(slices) - _MOST_SLICES, 'slice')} more (--json has all)"
    table.title = deciding
    return table


def _score_cell(name: str, found: ScoreOfRows | None) -> str:
    return "" if found is None else _cell(name, (found.value, found.interval), True)


def plain_table(*titles: str, head: str = "") -> Table:
    """A table without lines: names under `head`, and columns of numbers."""
    table = Table(box=None, pad_edge=False, title_justify="left", caption_justify="left")
    table.add_column(escape(head), no_wrap=True)
    for title in titles:
        table.add_column(escape(title), justify="right", overflow="fold", no_wrap=title in _BESIDE)
    return table


def describe_worse(
    rows: Sequence[ComparedRow], count: int, names: tuple[str, str] = ("first", "second")
) -> list[str]:  # fmt: skip
    """The rows on which the second model is worse than the first, the worst first; lines with markup."""
    worse = [row for row in rows if row.gain < 0]
    if not worse or not count:
        return []
    lines = [f"\n{pluralize(len(worse))} got worse" + (f"; the worst {count}:" if len(worse) > count else ":")]
    for row in worse[:count]:
        lines.append(f"[bold]{escape(row.first.location)}[/]  {escape(row.first.question.strip())}")
        if row.first.answer is None or row.second.answer is None:
            continue
        said = zip(("reference", *names), (row.first.reference, row.first.answer, row.second.answer), strict=True)
        lines += [f"  {name + ':':<10} {escape(text.strip() or '(nothing)')}" for name, text in said]
    return lines
