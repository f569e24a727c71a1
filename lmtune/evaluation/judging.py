"""The judge of `evaluate` and `compare`: which rows it is asked about, where its verdicts are kept, what is shown."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from lmtune.config.load import load_config
from lmtune.config.schema import FinetuneConfig, ModelConfig
from lmtune.errors import ConfigError, DataError, LmtuneError, ModelError
from lmtune.evaluation.compare import ComparedRow
from lmtune.evaluation.judge import Judge, Judgement, Pair, judged
from lmtune.evaluation.kept import KeptLines
from lmtune.evaluation.results import RowResult
from lmtune.evaluation.showing import Tree, write_rows
from lmtune.io.atomic import cache_folder
from lmtune.io.console import err, escape, out, print_json
from lmtune.io.text import pluralize
from lmtune.runs.columns import run_of

Rows = Sequence[ComparedRow | RowResult]


def open_judge(url: str | None, model: str | None, targets: Sequence[str], answer_rows: int) -> Judge | None:
    """The judge that a command was asked for, before any model is loaded; None without one.

    Args:
        url, model: as of `Judge.at`, whose errors it raises.
        targets: whose answers are compared, no files.
        answer_rows: of how many rows each of them gives an answer.

    Raises:
        ConfigError: there will be no answers to compare.
    """
    if url is None:
        return None
    if not answer_rows:
        raise ConfigError("--judge: compares generated answers, and none are asked for; raise the number of rows")
    for target in targets:
        if (what := _other_than_answers(target)) is not None:
            raise ConfigError(f"--judge: compares generated answers; {target} is {what}; leave --judge out")
    return Judge.at(url, model)


def _other_than_answers(target: str) -> str | None:
    """What a model is that generates no answers, as far as its files on this machine tell; None for others."""
    if (run := run_of(target)) is not None:
        kind = load_config(FinetuneConfig, run.config).objective.kind
        return None if kind == "sft" else f"of objective.kind: {kind}, which is scored without answers"
    from lmtune.models.base import stored_head
    from lmtune.models.tuning.adapter_files import Metadata

    with contextlib.suppress(ModelError, ValueError):  # loading says what is wrong with a model
        if (Metadata.read(Path(target)).head or stored_head(ModelConfig(name=target))) is not None:
            return "a classifier"
    return None


def judge_scored(
    judge: Judge | None, rows: Rows, tree: Tree, output: Path | None, names: tuple[str, str], as_json: bool
) -> None:
    """Let the judge compare rows whose scores are done, and print what it says; none of them is lost if it fails.

    `tree` is printed where `as_json`, whatever happens; its `judge` then says what went wrong.

    Args:
        judge: None prints `tree` as it is.
        rows: of two models, or of one beside the reference.
        tree: the scores and, as `rows`, the rows; what the judge says is added to both.
        output: the file of the rows, written again with the verdicts.
        names: of the second model and of what it is compared with.
        as_json: whether there is no text for people.

    Raises:
        LmtuneError: no row has answers, or the judge does not answer; not a ConfigError, since scores were written.
    """
    judgement = None
    try:
        if judge is not None:
            judgement = _judgement(judge, rows, output)
            tree["judge"] = judgement.as_dict()
            for row in tree["rows"]:
                row["judge"] = judgement.by_row.get((str(row["row"]), str(row["question"])))
            write_rows(output, tree["rows"], " with verdicts")
    except BaseException as error:
        tree["judge"] = {"error": str(error) or "stopped"}
        if isinstance(error, LmtuneError):
            raise LmtuneError(str(error)) from error
        raise
    finally:
        if as_json:
            print_json(tree)
    if judgement is not None and not as_json:
        describe_judgement(judgement, *names)


def _judgement(judge: Judge, rows: Rows, output: Path | None) -> Judgement:
    """Verdicts are kept beside `output`, or in the cache where no file is written."""
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


def describe_judgement(judgement: Judgement, second: str, first: str) -> None:
    """Print the sentence, and how far the judge can be trusted."""
    wins, losses, ties = judgement.counts
    counted = f"{second} wins {wins}, {first} {losses}, ties {ties}"
    out.print(escape(f"judge: {judgement.sentence(second)} ({counted})"))
    if judgement.contradicted:
        out.print(f"of {pluralize(judgement.contradicted)} the judge named what stood first, or second, in both orders")
    if judgement.unread:
        err.print(f"of {pluralize(judgement.unread)} the judge's answer names no side; these are left out")
