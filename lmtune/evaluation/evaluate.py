"""What a loaded model makes of rows, with and without its adapter: the story of `lmtune evaluate`.

found = evaluate_loaded(load_for_inference("runs/support"), ["heldout.jsonl"], 200, 128, 2048)
found.tuned.exact_match, found.intervals["tuned"]["exact_match"], found.comparison.rows[0]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from lmtune.config.load import build_config, load_config
from lmtune.config.schema import DataConfig, DataSource, FinetuneConfig
from lmtune.data.report import PartReport, label_name
from lmtune.data.store import TokenizedData, load_data, tokenize
from lmtune.data.types import ExampleStore
from lmtune.errors import DataError, LmtuneError
from lmtune.evaluation.answer_metrics import AnswerMetric, answer_metric, mean_of_sums
from lmtune.evaluation.compare import Comparison, Slice, compare, slices_of
from lmtune.evaluation.generative import Answer, questions, text_read, verdict_text
from lmtune.evaluation.intervals import Interval, interval, interval_of
from lmtune.evaluation.measures import measure
from lmtune.evaluation.results import RowResult, is_share, scores_of
from lmtune.evaluation.scoring import (
    RowScores,
    Scores,
    check_lengths,
    evaluate,
    plural_of,
    score_rows,
    sequence_logprobs,
)
from lmtune.evaluation.slices import slice_names
from lmtune.forward.packed import PackedForward
from lmtune.inference.load import LoadedModel
from lmtune.inference.start_adapter import as_it_began
from lmtune.io.console import warn
from lmtune.models.head import Head
from lmtune.objectives.base import Objective
from lmtune.objectives.chosen import objective_for, objective_of
from lmtune.objectives.sft import Sft
from lmtune.runs.store import RunDirectory

Intervals = Mapping[str, Interval | None]
_MEASURED_ROWS = 20_000  # of more, measures that are no sums have no interval: each takes seconds


@dataclass(frozen=True)
class Evaluation:
    """What a model scores on some rows.

    Attributes:
        tuned: scores of the model as it is; `metrics` has those of generated answers that were asked for.
        base: of the same model without its adapter; None for a model that has none.
        answers: the model's generated answers beside the reference, in the order of the rows.
        report: what became of every row read.
        trained_rows: how many of the scored rows the model was trained on; None if that is not known.
        intervals: of `tuned` and `base` the 95 % interval of each score.
        rows: what the model makes of each row.
        comparison: the model beside its base, row by row; None for a model that has none.
        slices: the rows by a field, where that was asked for.
    """

    tuned: Scores
    base: Scores | None
    answers: list[Answer]
    report: PartReport
    trained_rows: int | None = None
    intervals: Mapping[str, Intervals] = field(default_factory=dict)
    rows: list[RowResult] = field(default_factory=list)
    comparison: Comparison | None = None
    slices: list[Slice] = field(default_factory=list)


@dataclass(frozen=True)
class _Found:
    """What one model makes of the rows."""

    scores: Scores
    intervals: Intervals
    rows: list[RowResult]
    answers: list[Answer]


@dataclass(frozen=True)
class Scorer:
    """A loaded model with rows to score it on.

    Attributes:
        data: the rows as they were read.
        rows: with what the objective computes of them beforehand.
    """

    loaded: LoadedModel
    forward: PackedForward
    objective: Objective
    data: TokenizedData
    rows: ExampleStore
    max_length: int

    @classmethod
    def of(
        cls, loaded: LoadedModel, paths: Sequence[str | DataSource], max_length: int,
        columns: Mapping[str, str] | None, verb: str,
    ) -> Scorer:  # fmt: skip
        """Read and tokenize the rows; DataError and ConfigError as of `evaluate_loaded`."""
        tree = {"train": "given", "max_length": max_length, "columns": columns}
        objective = objective_of_model(loaded)
        settings = build_config(DataConfig, tree, where=f"lmtune {verb}")
        data = tokenize(paths, loaded.renderer, settings, rows=objective.rows)
        check_lengths(loaded.model, [data], "--max-length")
        forward = loaded.packed_forward()
        with as_it_began(loaded) as problem:
            find = partial(sequence_logprobs, forward, objective.units, what=plural_of(objective))
            rows = objective.precompute(data, find)
        if loaded.head is None and rows is not data:
            if not loaded.has_adapter:
                warn("this model has no adapter to leave out, so it is its own reference, and rewards are 0")
            elif problem is not None:
                warn(f"the run began from an adapter, its reference in training, which cannot be used: {problem}; the "
                     "reference here is the base, so loss and rewards are not those of the run's summary")  # fmt: skip
        return cls(loaded, forward, objective, data, rows, max_length)

    def score(
        self, answer_rows: int, max_new_tokens: int, metrics: Sequence[AnswerMetric], who: str = "the model"
    ) -> _Found:
        """What the model, as it is now, makes of all rows; it generates answers for the first `answer_rows`."""
        tokens, renderer = max(4096, self.max_length), self.loaded.renderer
        found = score_rows(self.forward, self.objective, self.rows, tokens, who)
        scores, answers = evaluate(
            self.forward, renderer, self.rows, answer_rows, max_new_tokens, tokens, self.objective, who=who,
            known=found,
        )  # fmt: skip
        if self.objective.rows != "answer":
            return _Found(scores, intervals_of(found, self.loaded.head), self._rows_of_objective(found), [])
        rows = self._rows_of_answers(found, answers)
        by_name = scores_of(rows, [*metrics, answer_metric("exact")])
        asked = {metric.name: by_name[metric.name].value for metric in metrics if metric.name in by_name}
        intervals = {name: one.interval for name, one in by_name.items()}
        intervals["exact_match"] = intervals["exact"] if answers else None
        intervals["perplexity"] = _exp(intervals["loss"])
        return _Found(replace(scores, metrics={**scores.metrics, **asked}), intervals, rows, answers)

    def _rows_of_answers(self, scored: RowScores, answers: Sequence[Answer]) -> list[RowResult]:
        said = {answer.row: answer for answer in answers}
        rows = []
        for row, (parts, length) in enumerate(zip(_parts(scored), self._lengths(), strict=True)):
            answer = said.get(row)
            found = RowResult(self.data.location(row), parts=parts, length=length)
            if answer is not None:
                found = replace(
                    found, question=answer.question, reference=answer.reference, answer=answer.prediction
                )  # fmt: skip
            rows.append(found)
        return rows

    def _rows_of_objective(self, found: RowScores) -> list[RowResult]:
        renderer, head = self.loaded.renderer, self.loaded.head
        question_of = questions(renderer)
        rows = []
        for row, (parts, length) in enumerate(zip(_parts(found), self._lengths(), strict=True)):
            example = self.data[row]
            ids, mask = example.sequences[0].input_ids, example.sequences[0].loss_mask
            reference = renderer.decode(ids[mask].tolist()) if example.label is None else label_name(example.label)
            said = None if found.outputs is None or head is None else verdict_text(head, found.outputs[row])
            parts["accuracy"] = parts.pop("sequence_accuracy")
            rows.append(RowResult(example.location, text_read(question_of, example), reference, said, parts, length))
        return rows

    def _lengths(self) -> list[int]:
        return [int(number) for number in self.data.num_tokens]


def _parts(found: RowScores) -> list[dict[str, tuple[float, float]]]:
    """`RowScores.parts` by row."""
    lists = {name: part.tolist() for name, part in found.parts.items()}
    count = found.scores.rows
    return [{name: (part[row][0], part[row][1]) for name, part in lists.items()} for row in range(count)]


def intervals_of(found: RowScores, head: Head | None) -> Intervals:
    """Of the scores of an objective over rows, those that are sums and those that are not."""
    known: dict[str, Interval | None] = {
        name: interval(part[part[:, 1] != 0], mean_of_sums, may_be_share=is_share(name))
        for name, part in found.parts.items()
    }
    outputs, targets, rows = found.outputs, found.targets, found.scores.rows
    if head is None or outputs is None or targets is None or rows > _MEASURED_ROWS:
        return known

    def measured(some: npt.NDArray[np.int64], name: str) -> float | None:
        return measure(head, outputs[some], targets[some])[0].get(name)

    names = found.scores.metrics.keys() - known.keys()
    return {**known, **{name: interval_of(partial(measured, name=name), rows) for name in names}}


def _exp(found: Interval | None) -> Interval | None:
    return None if found is None else Interval(*(math.exp(min(edge, 700.0)) for edge in found))


def evaluate_loaded(
    loaded: LoadedModel, paths: Sequence[str | DataSource], exact_match_rows: int, max_new_tokens: int, max_length: int,
    columns: Mapping[str, str] | None = None, metrics: Sequence[AnswerMetric] = (), by: str | None = None,
) -> Evaluation:  # fmt: skip
    """Score a loaded model on the rows of `paths`, and its base beside it; answers are generated for some rows.

    Args:
        loaded: the model.
        paths: files or folders of rows.
        exact_match_rows: generate answers for so many rows.
        max_new_tokens: where an answer that does not stop is cut.
        max_length: longer rows are left out.
        columns: is `data.columns` for these rows, see `lmtune.runs.columns`.
        metrics: of the generated answers, besides exact match; the first decides whether the tuned model is better.
        by: of which slices of the rows the scores are wanted, see `lmtune.evaluation.slices`.

    Raises:
        DataError: a row is faulty, or none is left.
        ConfigError: `max_length` is beyond the model's positions, or no row has the field `by`.
    """
    scorer = Scorer.of(loaded, paths, max_length, columns, "evaluate")
    tuned = scorer.score(exact_match_rows, max_new_tokens, metrics)
    base = None
    if loaded.has_adapter:
        with loaded.use_base():
            base = scorer.score(exact_match_rows, max_new_tokens, metrics, "the base")
    known = _trained_rows(loaded)
    trained = None if known is None else int(np.isin(scorer.data.content, known).sum())
    deciding = metrics or (answer_metric("exact"),)
    comparison = None if base is None else compare(base.rows, tuned.rows, deciding)
    slices = []
    if by is not None:
        names = slice_names(by, paths, tuned.rows)
        slices = slices_of(names, None if base is None else base.rows, tuned.rows, deciding)
    intervals = {"tuned": tuned.intervals, **({} if base is None else {"base": base.intervals})}
    return Evaluation(
        tuned.scores, None if base is None else base.scores, tuned.answers, scorer.data.report, trained, intervals,
        tuned.rows, comparison, slices,
    )  # fmt: skip


def row_results(
    loaded: LoadedModel, paths: Sequence[str], answer_rows: int, max_new_tokens: int, max_length: int,
    columns: Mapping[str, str] | None = None,
) -> list[RowResult]:  # fmt: skip
    """What a model makes of every row of `paths`; of answers it generates some for the first `answer_rows`.

    `columns` is `data.columns` for these rows.

    Raises:
        DataError: a row is faulty, or none is left.
    """
    scorer = Scorer.of(loaded, paths, max_length, columns, "compare")
    if scorer.objective.two_passes or scorer.objective.rows == "judged":
        raise DataError("compare reads answers, pairs and labelled rows; judged answers are scored by lmtune evaluate")
    return scorer.score(answer_rows, max_new_tokens, (), loaded.name).rows


def objective_of_model(loaded: LoadedModel) -> Objective:
    """What a model was trained for: as its run says, by its head, or answers."""
    if loaded.run is not None:
        return objective_of(load_config(FinetuneConfig, loaded.run.config).objective, loaded.head)
    return Sft() if loaded.head is None else objective_for(loaded.head)


def _trained_rows(loaded: LoadedModel) -> npt.NDArray[np.uint64] | None:
    """The hashes of the rows that the model, or a member of it, was trained on; None if that is not known of all."""
    runs = loaded.member_runs if loaded.members.adapters else () if loaded.run is None else (loaded.run,)
    found = [rows for run in runs if (rows := _trained_rows_of(run, loaded)) is not None]
    return np.concatenate(found) if found and len(found) == len(runs) else None


def _trained_rows_of(run: RunDirectory, loaded: LoadedModel) -> npt.NDArray[np.uint64] | None:
    """The hashes of the rows that `run` trained on; None if its data is not here any more, or is not the same."""
    try:
        config = load_config(FinetuneConfig, run.config)
        data = load_data(config.data, loaded.renderer, config.train.seed, config.objective.rows)
        # by the files' content: the tokenizer beside an adapter may name another end token than the base's
        begun, selection = run.read_data_report(), run.read_selection()
        if begun is None or begun.train.sha256 != data.report.train.sha256:
            return None
        return (data if selection is None else data.selected(selection, config.data)).train.content
    except (LmtuneError, OSError):
        return None
