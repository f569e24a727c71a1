"""What `lmtune evaluate` measures without rows of the user's: drift from the base, and tasks of lm-eval."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lmtune.evaluation.drift import Drift, drift_of
from lmtune.evaluation.intervals import Interval
from lmtune.evaluation.lm_eval_tasks import TaskScore, require_lm_eval, task_scores
from lmtune.evaluation.tables import plain_table
from lmtune.inference.load import LoadedModel
from lmtune.io.console import escape, out


@dataclass(frozen=True)
class Further:
    """What was asked for."""

    drift: Drift | None = None
    tasks: list[TaskScore] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """For `--json`: `drift` and `lm_eval`, if they were measured."""
        drift = {} if self.drift is None else {"drift": self.drift.as_dict()}
        return {**drift, **({"lm_eval": [score.as_dict() for score in self.tasks]} if self.tasks else {})}


def score_further(loaded: LoadedModel, drift: bool, prompts: Path | None, tasks: str | None) -> Further:
    """Measure what was asked for; errors as of `drift_of` and `task_scores`."""
    if tasks is not None:
        require_lm_eval()
    moved = drift_of(loaded, prompts) if drift else None
    return Further(moved, task_scores(loaded, tasks) if tasks is not None else [])


def print_further(found: Further, shown: int) -> None:
    """Show it, and the prompts whose answers changed most."""
    if found.drift is not None:
        _print_drift(found.drift, shown)
    if not found.tasks:
        return
    has_base = any(score.base is not None for score in found.tasks)
    table = plain_table(
        "metric", *(("base",) if has_base else ()), "tuned" if has_base else "score", head="lm-eval task"
    )
    for score in found.tasks:
        cells = [_with_error(score.tuned, score.tuned_error)]
        if has_base:
            cells.insert(0, _with_error(score.base, score.base_error))
        table.add_row(escape(score.task), escape(score.metric), *cells)
    out.print(table)


def _print_drift(found: Drift, shown: int) -> None:
    kl, changed = found.kl, found.changed
    out.print(
        f"drift from the base on {kl.rows} prompts: {kl.value:.4f} nats a token{_range(kl.interval)}, "
        f"{100 * changed.value:.0f} % of answers changed{_range(changed.interval, 100)}"
    )
    for row in [row for row in found.rows if row.is_changed][:shown]:
        out.print(f"[bold]{row.kl:.4f}[/]  {escape(row.prompt.strip())}")
        for name, text in (("base", row.base), ("tuned", row.tuned)):
            out.print(f"  {name + ':':<7} {escape(text.strip() or '(nothing)')}")


def _range(found: Interval | None, factor: int = 1) -> str:
    if found is None:
        return ""
    low, high = (f"{factor * edge:.0f}" if factor > 1 else f"{edge:.4f}" for edge in found)
    return f" ({low} to {high})"


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    form = ".4f" if abs(value) < 1000 else ".4g"
    return f"{value:{form}}" if error is None else f"{value:{form}} ± {1.96 * error:{form}}"
