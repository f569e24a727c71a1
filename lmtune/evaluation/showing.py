"""What `lmtune evaluate` and `lmtune compare` print, write with `-o`, and give as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmtune.data.report import describe_part
from lmtune.errors import ConfigError
from lmtune.evaluation.answer_files import read_answers
from lmtune.evaluation.answer_metrics import AnswerMetric, answer_metric
from lmtune.evaluation.compare import ComparedRow, Comparison, Slice, slices_of
from lmtune.evaluation.intervals import Difference
from lmtune.evaluation.results import RowResult, ScoreOfRows, scores_of, values_of
from lmtune.evaluation.slices import slice_names
from lmtune.evaluation.tables import Cell, comparison_table, describe_worse, evaluation_table, slices_table
from lmtune.io.atomic import write_text
from lmtune.io.console import err, escape, out, print_json
from lmtune.io.text import pluralize
from lmtune.runs.pictures import confusion_svg
from lmtune.runs.tables import print_classes

if TYPE_CHECKING:
    from lmtune.evaluation.evaluate import Evaluation
    from lmtune.evaluation.scoring import Scores

Tree = dict[str, Any]


def write_rows(path: Path | None, rows: Iterable[Mapping[str, object]], what: str = "") -> None:
    """Rows as JSONL, if a file was asked for; `what` says what is new in them."""
    if path is None:
        return
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text(path, "".join(lines))
    err.print(f"{pluralize(len(lines))}{what} in {escape(str(path))}")


def difference_trees(differences: Mapping[str, Difference]) -> Tree:
    """By metric, with the verdict."""
    return {name: {**vars(one), "verdict": one.verdict} for name, one in differences.items()}


def slice_trees(slices: Sequence[Slice]) -> list[Tree]:
    """Each slice with all its scores."""
    return [
        {
            "slice": one.name, "rows": one.rows, "scores": score_trees(one.scores),
            "differences": {} if one.compared is None else difference_trees(one.compared.differences),
        }
        for one in slices
    ]  # fmt: skip


def score_trees(scores: Mapping[str, ScoreOfRows]) -> Tree:
    """By metric."""
    return {name: {"value": one.value, "interval": one.interval, "rows": one.rows} for name, one in scores.items()}


def row_trees(
    rows: Sequence[ComparedRow | RowResult], names: tuple[str, str], metrics: Sequence[AnswerMetric]
) -> list[Tree]:
    """Rows for a file, with their scores: of two models under their names, of one under the second."""
    trees = []
    for row in rows:
        if isinstance(row, ComparedRow):
            trees.append(dict(row.as_dict(*names, metrics)))
        else:
            own = {"row": row.location, "question": row.question, "reference": row.reference, names[1]: row.answer}
            trees.append({**own, "scores": {names[1]: values_of(row, metrics)}})
    return trees


def comparison_tree(compared: Comparison, slices: Sequence[Slice], metrics: Sequence[AnswerMetric]) -> Tree:
    """All of a comparison, for `--json`; each row has its own scores by `metrics`."""
    differences, rows = difference_trees(compared.differences), row_trees(compared.rows, ("first", "second"), metrics)
    return {"scores": compared.scores, "differences": differences, "slices": slice_trees(slices), "rows": rows}


def print_comparison(
    first: str, second: str, compared: Comparison, shown: int, slices: Sequence[Slice] = (), by: str | None = None
) -> None:
    """Two models beside each other, the sentence, the slices, and what got worse."""
    out.print(comparison_table(first, second, compared))
    out.print(escape(f"{compared.deciding}: {compared.differences[compared.deciding].sentence(second)}"))
    print_slices(slices, by, second, first)
    for text in describe_worse(compared.rows, shown):
        out.print(text)


def print_slices(slices: Sequence[Slice], by: str | None, second: str = "tuned", first: str = "base") -> None:
    """The table of slices, if there are any."""
    if by is not None and (table := slices_table(slices, by, second, first)) is not None:
        out.print("")
        out.print(table)


def evaluation_tree(found: Evaluation, metrics: Sequence[AnswerMetric]) -> Tree:
    """All of an evaluation, for `--json`; each row has its own scores by `metrics`, and whether it is right."""
    before, tuned, classes = found.base, found.tuned, found.tuned.classes
    errors = {"tuned": tuned.standard_errors, "base": before.standard_errors if before else None}
    compared = found.comparison
    tree: Tree = {"base": before.as_dict() if before else None, "tuned": tuned.as_dict()}
    if classes is not None:
        tree["classes"] = asdict(classes)
    tree |= {"standard_errors": errors, "intervals": found.intervals}
    if compared is not None:
        tree["differences"] = difference_trees(compared.differences)
        tree["verdict"] = sentence_of(compared)
    tree |= {"slices": slice_trees(found.slices)} if found.slices else {}
    tree |= {"trained_rows": found.trained_rows, "data": found.report.to_dict()}
    answers = [{"question": a.question, "reference": a.reference, "answer": a.prediction} for a in found.answers]
    of_rows = [*metrics, replace(answer_metric("exact"), name="exact_match")]
    return {**tree, "answers": answers, "rows": row_trees(rows_worst_first(found), ("base", "tuned"), of_rows)}


def rows_worst_first(found: Evaluation) -> Sequence[ComparedRow | RowResult]:
    """Those that got worse first; of a model without a base those with the greatest loss, or an error."""
    if found.comparison is not None:
        return found.comparison.rows
    return sorted(found.rows, key=lambda row: -values_of(row).get("loss", 0.0))


def sentence_of(compared: Comparison) -> str:
    """The sentence about tuned beside base, and the metric that it is about."""
    return f"{compared.deciding}: {compared.differences[compared.deciding].sentence()}"


def print_evaluation(
    found: Evaluation, metrics: Sequence[AnswerMetric], shown: int, by: str | None
) -> None:  # fmt: skip
    """What was read, each score with its interval, the sentence, the slices, what got worse, and each class."""

    def cells(name: str, scores: Scores) -> dict[str, Cell]:
        intervals = found.intervals.get(name, {})
        return {key: (value, intervals.get(key)) for key, value in scores.as_dict().items()}

    out.print(escape("\n".join(describe_part(found.report))))
    before = None if found.base is None else cells("base", found.base)
    out.print(evaluation_table(before, cells("tuned", found.tuned), [metric.name for metric in metrics]))
    asked = found.tuned.exact_match_rows
    out.print(f"over {pluralize(found.tuned.rows)}" + (f", answers to {asked:,} of them" if asked else ""))
    if found.comparison is not None:
        out.print(escape(sentence_of(found.comparison)))
    print_slices(found.slices, by)
    if found.comparison is not None:
        for text in describe_worse(found.comparison.rows, shown, ("base", "tuned")):
            out.print(text)
    print_classes(None if found.tuned.classes is None else asdict(found.tuned.classes))


def evaluate_file(
    path: str, metrics: Sequence[AnswerMetric], by: str | None, output: Path | None, as_json: bool,
    columns: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Score answers in a file, and show, write and print them as those of a model."""
    rows = read_answers(path, columns)
    scores = scores_of(rows, metrics)
    slices = [] if by is None else slices_of(slice_names(by, [path], rows), None, rows, metrics)
    trees = row_trees(rows, ("", "tuned"), metrics)
    write_rows(output, trees)
    if as_json:
        print_json({"tuned": score_trees(scores), "slices": slice_trees(slices), "rows": trees})
        return
    out.print(evaluation_table(None, {name: (one.value, one.interval) for name, one in scores.items()}, list(scores)))
    out.print(f"over {pluralize(len(rows))}")
    print_slices(slices, by)


def draw_confusion(path: Path | None, classes: Tree | None) -> None:
    """The picture in a file, if one was asked for; ConfigError where there is no such matrix."""
    if path is None:
        return
    picture = None if classes is None else confusion_svg(classes)
    if picture is None:
        raise ConfigError("--confusion: only a model that gives one class a row has a confusion matrix; leave it out")
    write_text(path, picture)
    err.print(f"the confusion matrix is in {escape(str(path))}")
