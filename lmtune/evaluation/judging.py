"""The judge of `evaluate` and `compare`: which rows it is asked about, where its verdicts are kept, what is shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmtune.errors import DataError
from lmtune.evaluation.compare import ComparedRow
from lmtune.evaluation.judge import Judge, Judgement, Pair, judged
from lmtune.evaluation.kept import KeptLines
from lmtune.evaluation.results import RowResult
from lmtune.io.atomic import cache_folder
from lmtune.io.console import err, escape, out
from lmtune.io.text import pluralize


def open_judge(url: str | None, model: str | None) -> Judge | None:
    """The judge that a command was asked for; errors as of `Judge.at`, before any model is loaded."""
    return None if url is None else Judge.at(url, model)


def judge_rows(judge: Judge | None, rows: Sequence[ComparedRow | RowResult], output: Path | None) -> Judgement | None:
    """What the judge says of rows of two models, or of one model beside the reference; None without a judge.

    Verdicts are kept beside `output`, or in the cache where no file is written.

    Raises:
        DataError: no row has answers.
        LmtuneError: the judge does not answer.
    """
    if judge is None:
        return None
    pairs = [pair for row in rows if (pair := pair_of(row)) is not None]
    if not pairs:
        raise DataError("--judge: no row has generated answers; a judge compares answers of language models")
    path = cache_folder() / "verdicts.jsonl" if output is None else output.with_suffix(".verdicts.jsonl")
    with judge:
        return judged(pairs, judge, KeptLines(path))


def pair_of(row: ComparedRow | RowResult) -> Pair | None:
    """The answers of two models; of one model its answer as the second, the reference as the first."""
    if isinstance(row, RowResult):
        said = row.answer
        return Pair(row.location, row.question, "", row.reference, said) if row.is_answer and said is not None else None
    one, other = row.first, row.second
    if not (one.is_answer and other.is_answer) or one.answer is None or other.answer is None:
        return None
    return Pair(one.location, one.question, one.reference, one.answer, other.answer)


def with_verdicts(rows: list[dict[str, object]], judgement: Judgement | None) -> list[dict[str, object]]:
    """Rows for a file, with what the judge says of each as `judge`: first, second or tie, or null."""
    for row in rows if judgement is not None else ():
        assert judgement is not None
        row["judge"] = judgement.by_row.get((str(row["row"]), str(row["question"])))
    return rows


def describe_judgement(judgement: Judgement | None, second: str, first: str) -> None:
    """Print the sentence, and how far the judge can be trusted."""
    if judgement is None:
        return
    wins, losses, ties = judgement.counts
    counted = f"{second} wins {wins}, {first} {losses}, ties {ties}"
    out.print(escape(f"judge: {judgement.sentence(second)} ({counted})"))
    if judgement.contradicted:
        out.print(f"of {pluralize(judgement.contradicted)} the judge named what stood first, or second, in both orders")
    if judgement.unread:
        err.print(f"of {pluralize(judgement.unread)} the judge's answer names no side; these are left out")
