"""Two models on the same rows: how far their scores are apart, how sure that is, and which rows got worse.

compared = compare(first, second, [answer_metric("chrf")])          # rows of `row_results`, or of files of answers
compared.differences["chrf"].sentence("runs/b")
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from lmtune.errors import DataError
from lmtune.evaluation.answer_metrics import AnswerMetric
from lmtune.evaluation.intervals import Difference, difference
from lmtune.evaluation.results import (
    OF_VALUES,
    Measured,
    RowResult,
    ScoreOfRows,
    by_metric,
    by_part,
    deciding_parts,
    scores_of,
    values_of,
)

_LOWER_IS_BETTER = ("loss", *OF_VALUES)


@dataclass(frozen=True)
class ComparedRow:
    """One row of both models, and by how much the second is better, in the first metric that tells them apart."""

    first: RowResult
    second: RowResult
    gain: float

    def as_dict(
        self, first: str = "first", second: str = "second", metrics: Sequence[AnswerMetric] = ()
    ) -> dict[str, object]:
        """For a line of JSON; the models' answers and scores, those by `metrics` too, stand under their names."""
        tree: dict[str, object] = {"row": self.first.location, "gain": self.gain}
        tree.update(question=self.first.question, reference=self.first.reference)
        tree.update({first: self.first.answer, second: self.second.answer})
        return {**tree, "scores": {first: values_of(self.first, metrics), second: values_of(self.second, metrics)}}


@dataclass(frozen=True)
class Comparison:
    """Two models on the rows that both could read.

    Attributes:
        scores: of both models by metric.
        differences: of the second beside the first by metric, the one that decides first.
        rows: those that got worse first.
        left_out: rows that only one of the two could read.
    """

    scores: dict[str, tuple[float, float]]
    differences: dict[str, Difference]
    rows: list[ComparedRow]
    left_out: int

    @property
    def deciding(self) -> str:
        """The metric that the sentence is about."""
        return next(iter(self.differences))


@dataclass(frozen=True)
class Slice:
    """Some of the rows, which have one value of a field.

    Attributes:
        name: the value.
        rows: how many.
        scores: of the second model, or of the only one; first what decides.
        compared: with the first; None of one model, and where no row has a score in common.
    """

    name: str
    rows: int
    scores: dict[str, ScoreOfRows] = field(default_factory=dict)
    compared: Comparison | None = None


def compare(first: Sequence[RowResult], second: Sequence[RowResult], metrics: Sequence[AnswerMetric]) -> Comparison:
    """The second model beside the first.

    Args:
        first, second: of rows that are told apart by their locations.
        metrics: of generated answers; the first decides.

    Raises:
        DataError: there is no row that both could read.
    """
    theirs = dict(_numbered(second))
    pairs = [(row, theirs[place]) for place, row in _numbered(first) if place in theirs]
    if not pairs:
        raise DataError("there is no row that both models could read")
    scores: dict[str, tuple[float, float]] = {}
    differences: dict[str, Difference] = {}
    gains, apart_by = np.zeros(len(pairs)), list[npt.NDArray[np.float64]]()
    for name, one, other in _measured(pairs, metrics):
        sign = -1 if name in _LOWER_IS_BETTER else 1
        found = difference(one.statistics, other.statistics, one.score, higher_is_better=sign > 0)
        if found is None:
            continue
        scores[name], differences[name] = (one.value, other.value), found
        apart = sign * (other.of_rows - one.of_rows)
        gains[one.places] = np.where(gains[one.places] == 0, apart, gains[one.places])
        apart_by.append(np.zeros(len(pairs)))
        apart_by[-1][one.places] = apart
    if not differences:
        raise DataError("the two models were trained for different things; compare models of one objective")
    rows = [ComparedRow(one, other, float(gain)) for (one, other), gain in zip(pairs, gains, strict=True)]
    left_out = len(first) + len(second) - 2 * len(pairs)
    order = np.lexsort(apart_by[::-1])  # by the first metric; rows that it does not tell apart by the next
    return Comparison(scores, differences, [rows[place] for place in order], left_out)


def _numbered(rows: Sequence[RowResult]) -> Iterator[tuple[tuple[str, int], RowResult]]:
    """Rows by their location, and which of its rows they are: a list in JSON may stand on one line."""
    seen = Counter[str]()
    for row in rows:
        yield (row.location, seen[row.location]), row
        seen[row.location] += 1


def _measured(
    pairs: Sequence[tuple[RowResult, RowResult]], metrics: Sequence[AnswerMetric]
) -> Iterator[tuple[str, Measured, Measured]]:
    """By metric what both models have of the same pairs."""
    answered = [place for place, pair in enumerate(pairs) if all(row.is_answer for row in pair)]
    answers = [pairs[place] for place in answered]
    for metric in metrics:
        both = [by_metric([pair[which] for pair in answers], metric) for which in (0, 1)]
        if both[0] is not None and both[1] is not None:
            places = np.array(answered)[both[0].places]
            yield metric.name, replace(both[0], places=places), replace(both[1], places=places)
    for name in deciding_parts(set.intersection(*(set(row.parts) for pair in pairs for row in pair))):
        both = [by_part([pair[which] for pair in pairs], name) for which in (0, 1)]
        if both[0] is not None and both[1] is not None and np.array_equal(both[0].places, both[1].places):
            yield name, both[0], both[1]


def slices_of(
    names: Mapping[str, str], first: Sequence[RowResult] | None, second: Sequence[RowResult],
    metrics: Sequence[AnswerMetric],
) -> list[Slice]:  # fmt: skip
    """The rows by the slice that each location is in, in the order of `names`' values; `first` is None of one model."""
    found = []
    for name in dict.fromkeys(names.values()):
        rows, others = ([row for row in part or () if names.get(row.location) == name] for part in (second, first))
        if not rows:
            continue
        try:
            compared = compare(others, rows, metrics) if others else None
        except DataError:  # none of these rows was read by both
            compared = None
        found.append(Slice(name, len(rows), scores_of(rows, metrics), compared))
    return found
