"""Two models on the same rows: which is better, how sure that is, and which rows got worse.

lmtune compare runs/a runs/b heldout.jsonl
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lmtune.data.checking import check_data
from lmtune.data.columns import columns_of
from lmtune.errors import ConfigError
from lmtune.evaluation import options
from lmtune.io.console import progress, warn
from lmtune.io.text import pluralize
from lmtune.run import run
from lmtune.runs.columns import columns_for, run_of

if TYPE_CHECKING:
    from lmtune.evaluation.results import RowResult

METRICS = ("f1", "exact", "chrf")  # of generated answers, where none are asked for


def main(
    first: Annotated[str, typer.Argument(metavar="FIRST", help=options.TARGET)],
    second: Annotated[str, typer.Argument(metavar="SECOND", help="The model that is compared with it.")],
    data: options.Data = None,
    metric: options.Metrics = None,
    by: options.By = None,
    rows: options.AnswerRows = 200,
    max_new_tokens: options.NewTokens = 128,
    max_length: options.MaxLength = 2048,
    judge: options.JudgeAddress = None,
    judge_model: options.JudgeModel = None,
    output: options.Output = None,
    shown: options.Shown = 5,
    columns: options.ColumnNames = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document: scores, differences, rows, …")] = False,
) -> None:
    """SECOND beside FIRST on the same rows: loss and metrics of generated answers, with 95 % intervals.

    Differences are paired: both models answer the same rows, so rows that are hard for both do not blur them. Classes
    and pairs are compared by accuracy. The rows that got worse come first.

    Example: lmtune compare Qwen/Qwen3-0.6B runs/support heldout.jsonl --metric f1
    """
    from lmtune.evaluation.answer_files import aligned, is_answer_file, read_answers
    from lmtune.evaluation.answer_metrics import answer_metrics
    from lmtune.evaluation.compare import compare, slices_of
    from lmtune.evaluation.judging import judge_scored, open_judge
    from lmtune.evaluation.showing import comparison_tree, print_comparison, write_rows
    from lmtune.evaluation.slices import require_field, slice_names

    metrics, named = answer_metrics(metric, METRICS), columns_of(columns or [])
    files = [one for one in (first, second) if is_answer_file(one)]
    if bool(files) == bool(data):
        raise ConfigError(
            f"{files[0]} holds answers and the rows that they are of; leave {data[0]} out" if data and files
            else "DATA: missing; give files or folders of rows that both models answer"
        )  # fmt: skip
    paths = tuple(files[:1] or map(str, data or ()))
    known = columns_for(run_of(first), paths, named) or columns_for(run_of(second), paths, named)

    def rows_of(target: str) -> list[RowResult]:
        if target in files:
            return read_answers(target, known)
        with progress("loading PyTorch and the libraries"):
            from lmtune.evaluation.evaluate import row_results
            from lmtune.inference.load import load_for_inference

        return row_results(load_for_inference(target), paths, rows, max_new_tokens, max_length, known)

    asked = open_judge(judge, judge_model, [one for one in (first, second) if one not in files], rows)
    require_field(by, paths)
    if not files:
        check_data(paths, columns=known)
    one, other = rows_of(first), rows_of(second)
    if len(files) == 2:
        other = aligned(one, other)
    compared = compare(one, other, metrics)
    slices = [] if by is None else slices_of(slice_names(by, paths, one), one, other, metrics)
    tree = comparison_tree(compared, slices, metrics)
    write_rows(output, tree["rows"])
    if compared.left_out:
        warn(f"{pluralize(compared.left_out)} that only one of the two could read are left out (--max-length)")
    if not as_json:
        print_comparison(first, second, compared, shown, slices, by)
    judge_scored(asked, compared.rows, tree, output, (second, first), as_json)


if __name__ == "__main__":
    run(main)
