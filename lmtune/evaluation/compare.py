"""Two models on the same rows: how far their scores are apart, how sure that is, and which rows got worse.

first, second = (row_results(load(name), paths, …) for name in names)
compare(first, second, [answer_metric("chrf")]).differences["chrf"].sentence("runs/b")
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmtune.config.load import build_config
from lmtune.config.schema import DataConfig
from lmtune.data.store import tokenize
from lmtune.data.types import ExampleStore
from lmtune.errors import DataError
from lmtune.evaluation.answer_metrics import AnswerMetric, mean_of_sums
from lmtune.evaluation.generative import answers, split_prompt
from lmtune.evaluation.intervals import Difference, Score, difference
from lmtune.evaluation.scoring import check_lengths, forward_passes, objective_of_model, row_losses, units_of_rows
from lmtune.forward.packed import PackedForward
from lmtune.inference.load import LoadedModel
from lmtune.models.structure import max_positions
from lmtune.objectives.base import Objective

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RowResult:
    """What one model makes of one row.

    Attributes:
        location: `file:line`.
        question, reference: of the row; empty where it has none.
        answer: what the model generates; None where it was not asked.
        loss: of the row's targets together, in nats, and their number; None of other objectives than answers.
        is_right: of other objectives, whether the row, or pair, is on the right side; else None.
    """

    location: str
    question: str = ""
    reference: str = ""
    answer: str | None = None
    loss: tuple[float, float] | None = None
    is_right: bool | None = None


@dataclass(frozen=True)
class ComparedRow:
    """One row of both models, and by how much the second is better, in the first metric that tells them apart."""

    first: RowResult
    second: RowResult
    gain: float


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


def row_results(
    loaded: LoadedModel, paths: Sequence[str], answer_rows: int, max_new_tokens: int, max_length: int,
    base: bool = False, columns: Mapping[str, str] | None = None,
) -> list[RowResult]:  # fmt: skip
    """What a model makes of every row of `paths`; of answers it generates some for the first `answer_rows`.

    `base`: without its adapter; `columns` is `data.columns` for these rows.

    Raises:
        DataError: a row is faulty, or none is left.
    """
    tree = {"train": list(paths), "max_length": max_length, "columns": columns}
    settings = build_config(DataConfig, tree, where="lmtune compare")
    objective = objective_of_model(loaded)
    data = tokenize(paths, loaded.renderer, settings, rows=objective.rows)
    check_lengths(loaded.model, [data], "--max-length")
    forward = PackedForward(loaded.model)
    with loaded.use_base() if base else contextlib.nullcontext():
        if objective.rows != "answer":
            return _of_objective(forward, objective, data, max(4096, max_length), loaded)
        return _of_answers(forward, data, loaded, answer_rows, max_new_tokens, max(4096, max_length))


def _of_answers(
    forward: PackedForward, data: ExampleStore, loaded: LoadedModel, answer_rows: int, max_new_tokens: int, tokens: int
) -> list[RowResult]:  # fmt: skip
    losses, targets, _ = row_losses(forward, data, tokens, who=loaded.name)
    room = max_positions(loaded.model) or np.inf
    asked = [row for row in range(min(answer_rows, len(data))) if 0 < len(split_prompt(data[row])[0]) < room]
    with forward.autocast():
        given = answers(forward.model, loaded.renderer, data, asked, max_new_tokens, loaded.name)
    by_row = {answer.row: answer for answer in given}
    found = []
    for row in range(len(data)):
        location, loss = data[row].location, (float(losses[row]), float(targets[row]))
        if (answer := by_row.get(row)) is None:
            found.append(RowResult(location, loss=loss))
        else:
            found.append(RowResult(location, answer.question, answer.reference, answer.prediction, loss))
    return found


def _of_objective(
    forward: PackedForward, objective: Objective, data: ExampleStore, tokens: int, loaded: LoadedModel
) -> list[RowResult]:  # fmt: skip
    if objective.two_passes or objective.rows == "judged":
        raise DataError("compare reads answers, pairs and labelled rows; judged answers are scored by lmtune evaluate")
    errors = np.zeros(len(data))
    units = units_of_rows(data, objective.units)
    for _, batch, outputs in forward_passes(forward, data, units, tokens, f"scoring {loaded.name}"):
        errors += objective.loss(outputs, batch, 0.0).errors.cpu().double().numpy()
    return [RowResult(data[row].location, is_right=bool(errors[row] == 0)) for row in range(len(data))]


def compare(first: Sequence[RowResult], second: Sequence[RowResult], metrics: Sequence[AnswerMetric]) -> Comparison:
    """The second model beside the first.

    Args:
        first, second: of rows that are told apart by their locations.
        metrics: of generated answers; the first decides.

    Raises:
        DataError: there is no row that both could read.
    """
    theirs = {row.location: row for row in second}
    pairs = [(row, theirs[row.location]) for row in first if row.location in theirs]
    if not pairs:
        raise DataError("there is no row that both models could read")
    left_out = len(first) + len(second) - 2 * len(pairs)
    scores: dict[str, tuple[float, float]] = {}
    differences: dict[str, Difference] = {}
    gains = np.zeros(len(pairs))
    for name, of_first, of_second, score, places in _measured(pairs, metrics):
        higher = name != "loss"
        found = difference(of_first, of_second, score, higher_is_better=higher)
        if found is None:
            continue
        scores[name] = float(score(of_first.sum(0))), float(score(of_second.sum(0)))
        differences[name] = found
        apart = (score(of_second) - score(of_first)) * (1 if higher else -1)
        gains[places] = np.where(gains[places] == 0, apart, gains[places])
    if not differences:
        raise DataError("the two models were trained for different things; compare models of one objective")
    rows = [ComparedRow(one, other, float(gain)) for (one, other), gain in zip(pairs, gains, strict=True)]
    return Comparison(scores, differences, sorted(rows, key=lambda row: row.gain), left_out)


def _measured(
    pairs: Sequence[tuple[RowResult, RowResult]], metrics: Sequence[AnswerMetric]
) -> Iterator[tuple[str, Float64, Float64, Score, npt.NDArray[np.int64]]]:
    """By metric both models' statistics `[N, S]`, how they become a score, and the places of their rows in `pairs`."""
    answered = [i for i, (one, other) in enumerate(pairs) if one.answer is not None and other.answer is not None]
    for metric in metrics if answered else ():
        first, second = (
            metric.of_rows((pairs[i][0].reference, pairs[i][which].answer or "") for i in answered) for which in (0, 1)
        )
        yield metric.name, first, second, metric.score, np.array(answered)
    everywhere = np.arange(len(pairs))
    if all(one.loss and other.loss for one, other in pairs):
        first, second = (np.array([pair[which].loss for pair in pairs], dtype=np.float64) for which in (0, 1))
        yield "loss", first, second, mean_of_sums, everywhere
    if all(one.is_right is not None and other.is_right is not None for one, other in pairs):
        first, second = (np.array([(float(bool(pair[which].is_right)), 1.0) for pair in pairs]) for which in (0, 1))
        yield "accuracy", first, second, mean_of_sums, everywhere
