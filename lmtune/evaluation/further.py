"""What `lmtune evaluate` measures without rows of the user's: drift from the base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lmtune.evaluation.drift import Drift, drift_of
from lmtune.evaluation.intervals import Interval
from lmtune.inference.load import LoadedModel
from lmtune.io.console import escape, out


@dataclass(frozen=True)
class Further:
    """What was asked for."""

    drift: Drift | None = None

    def as_dict(self) -> dict[str, object]:
        """For `--json`: `drift`, if it was measured."""
        return {} if self.drift is None else {"drift": self.drift.as_dict()}


def score_further(loaded: LoadedModel, drift: bool, prompts: Path | None) -> Further:
    """Measure what was asked for; errors as of `drift_of`."""
    return Further(drift_of(loaded, prompts) if drift else None)


def print_further(found: Further, shown: int) -> None:
    """Show it, and the prompts whose answers changed most."""
    if found.drift is not None:
        _print_drift(found.drift, shown)


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
