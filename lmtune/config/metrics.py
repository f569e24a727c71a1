"""Which scores of held-out rows may choose the best step of a run or the best of several runs, and which way is better.

deciding_metric(config.evaluation.metric, config.objective.kind)       # ("loss", "min")
"""

from __future__ import annotations

from typing import Literal

Direction = Literal["min", "max"]
GENERATED = "exact_match"  # which needs answers to be generated
_PAIRS = ("loss", "pair_accuracy", "reward_accuracy", "reward_margin")
# By the kind of the objective, that which decides where the settings name none first.
METRICS: dict[str, tuple[str, ...]] = {
    "sft": ("loss", "perplexity", "token_accuracy", "sequence_accuracy", GENERATED),
    "dpo": _PAIRS, "ipo": _PAIRS, "orpo": _PAIRS, "simpo": _PAIRS,
    "kto": ("loss", "accuracy"),
    "classification": ("loss", "accuracy", "macro_f1", "auc"),
    "regression": ("loss", "mean_absolute_error", "r2", "spearman"),
    "reward": ("loss", "pair_accuracy", "reward_margin"),
}  # fmt: skip
_LOWER_IS_BETTER = frozenset({"loss", "perplexity", "mean_absolute_error"})


def direction_of(metric: str) -> Direction:
    """Whether the least or the greatest is best."""
    return "min" if metric in _LOWER_IS_BETTER else "max"


def deciding_metric(asked: str | None, objective: str) -> tuple[str, Direction]:
    """The metric that chooses, and which way is better: that of the settings, or the first of the objective's kind."""
    name = asked or METRICS[objective][0]
    return name, direction_of(name)
