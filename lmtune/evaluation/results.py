"""What a model makes of one row, and what many such rows add up to: the rows of `evaluate`, `compare` and `vote`.

Needs no torch, so that answers in files are compared at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lmtune.evaluation.answer_metrics import AnswerMetric, mean_of_sums
from lmtune.evaluation.intervals import Interval, interval

Float64 = npt.NDArray[np.float64]
OF_VALUES = ("mean_absolute_error", "squared_error")  # of regression, the second of answers in files
_COMPARED = {  # by a score that only such rows have
    "token_accuracy": ("loss", "token_accuracy", "sequence_accuracy"), "pair_accuracy": ("pair_accuracy", "accuracy"),
    "kl": ("loss",), **dict.fromkeys(OF_VALUES, OF_VALUES),
}  # fmt: skip


@dataclass(frozen=True)
class RowResult:
    """What one model makes of one row.

    Attributes:
        location: `file:line`.
        question, reference: of the row; empty where it has none.
        answer: what the model generates, or the class that it gives; None where it was not asked.
        parts: by score, the row's value and how much it counts: `{"loss": (nats, targets), …}`. Answers have
            `token_accuracy`, rows of other objectives `accuracy`.
        length: tokens of the row.
    """

    location: str
    question: str = ""
    reference: str = ""
    answer: str | None = None
    parts: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    length: int = 0

    @property
    def is_answer(self) -> bool:
        """Whether the answer is text by itself, and no class."""
        return self.answer is not None and not {"accuracy", "squared_error"} & self.parts.keys()


@dataclass(frozen=True)
class Measured:
    """The statistics `[N, S]` of some rows, how their sum becomes a score, and the rows' numbers among all."""

    statistics: Float64
    score: Callable[[Float64], Float64]
    places: npt.NDArray[np.int64]

    @property
    def value(self) -> float:
        """The score of all these rows."""
        return float(self.score(self.statistics.sum(0)))

    @property
    def of_rows(self) -> Float64:
        """The score of each row by itself, `[N]`."""
        return self.score(self.statistics)


def by_metric(rows: Sequence[RowResult], metric: AnswerMetric) -> Measured | None:
    """The rows that were answered and that the metric is about; None if there are none."""
    places = [place for place, row in enumerate(rows) if row.is_answer and metric.applies(row.reference)]
    if not places:
        return None
    pairs = ((rows[place].reference, rows[place].answer or "") for place in places)
    return Measured(metric.of_rows(pairs), metric.score, np.array(places))


def by_part(rows: Sequence[RowResult], name: str) -> Measured | None:
    """The rows that have the score `name`, one of `RowResult.parts`; None if there are none."""
    places = [place for place, row in enumerate(rows) if row.parts.get(name, (0, 0))[1]]
    if not places:
        return None
    statistics = np.array([rows[place].parts[name] for place in places], dtype=np.float64)
    return Measured(statistics, mean_of_sums, np.array(places))


def values_of(row: RowResult, metrics: Sequence[AnswerMetric] = ()) -> dict[str, float]:
    """The scores of one row by itself: of its answer by each metric about it, then those that it has already."""
    own = {metric.name: by_metric([row], metric) for metric in metrics}
    known = {name: value / count for name, (value, count) in row.parts.items() if count}
    return {**{name: found.value for name, found in own.items() if found is not None}, **known}


def is_share(name: str) -> bool:
    """Whether one of `RowResult.parts` is a share of rows, or of tokens; else it is a number, as a reward is."""
    return name.endswith("accuracy")


def part_names(rows: Sequence[RowResult]) -> list[str]:
    """The scores that rows have beside metrics of their answers, first what decides."""
    known = dict.fromkeys(name for row in rows for name in row.parts)
    return list(dict.fromkeys([*(name for name in deciding_parts(known) if name in known), *known]))


def deciding_parts(known: Collection[str]) -> tuple[str, ...]:
    """By which of the scores `known` models are compared beside metrics of their answers, first what decides.

    A model that is its own reference has rewards of 0, which are right nowhere; so pairs are told by which answer is
    the likelier one, and judged answers, which have a divergence, by their loss.
    """
    return next((names for mark, names in _COMPARED.items() if mark in known), ("accuracy",))


@dataclass(frozen=True)
class ScoreOfRows:
    """A score with its 95 % interval, None of fewer than two rows, and how many rows it is of."""

    value: float
    interval: Interval | None
    rows: int


def scores_of(rows: Sequence[RowResult], metrics: Sequence[AnswerMetric]) -> dict[str, ScoreOfRows]:
    """Of the answers by each metric, then the scores that the rows have already; first what decides."""
    found = [(metric.name, by_metric(rows, metric), True) for metric in metrics]
    found += [(name, by_part(rows, name), is_share(name)) for name in part_names(rows)]
    return {
        name: ScoreOfRows(one.value, interval(one.statistics, one.score, may_be_share=share), len(one.places))
        for name, one, share in found if one is not None
    }  # fmt: skip


def scores_of_parts(parts: Float64) -> ScoreOfRows:
    """The quotient of the sums of values and counts `[N, 2]`."""
    return ScoreOfRows(float(mean_of_sums(parts.sum(0))), interval(parts, mean_of_sums), len(parts))
