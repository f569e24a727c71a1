"""What a sweep found: `sweep.json`, and what `lmtune sweep --json` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lmtune.config.metrics import Direction

RESULT = "sweep.json"


@dataclass(frozen=True)
class TrialResult:
    """One trial.

    Attributes:
        number: from 0; its run is `trial-NNN`.
        status: complete, pruned, failed, running or waiting.
        values: of the keys that are searched, as the command line writes them.
        score: the deciding one, of held-out rows; None before the end.
        steps, seconds: of training.
        reason: why it was pruned or has failed.
        scores: all of them.
    """

    number: int
    status: str
    values: Mapping[str, str]
    score: float | None = None
    steps: int | None = None
    seconds: float | None = None
    reason: str = ""
    scores: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepResult:
    """All trials.

    Attributes:
        name: of the folder.
        metric, direction: by which trials are compared, and whether the least or the greatest is best.
        trials: by number.
        best: the number of the best one; None before one is complete.
        importances: the share of each key in how far scores differ, by PED-ANOVA.
    """

    name: str
    metric: str
    direction: Direction
    trials: tuple[TrialResult, ...]
    best: int | None = None
    importances: Mapping[str, float] = field(default_factory=dict)

    @property
    def ranked(self) -> list[TrialResult]:
        """The best first, those without a score last."""
        sign = 1 if self.direction == "min" else -1
        scored = [one for one in self.trials if one.score is not None]
        return sorted(scored, key=lambda one: (sign * (one.score or 0.0), one.number)) + [
            one for one in self.trials if one.score is None
        ]
