"""Two models on the same rows: which is better, how sure that is, and which rows got worse.

lmtune compare runs/a runs/b heldout.jsonl
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lmtune.data.checking import check_data
from lmtune.data.columns import columns_of
from lmtune.io.atomic import write_text
from lmtune.io.console import err, escape, out, print_json, progress, warn
from lmtune.io.text import pluralize
from lmtune.run import run
from lmtune.runs.columns import columns_for, run_of

METRICS = ("f1", "exact", "chrf")  # of generated answers, where none are asked for


def main(
    first: Annotated[str, typer.Argument(metavar="FIRST", help="A run, an adapter, a model folder or Hub id.")],
    second: Annotated[str, typer.Argument(metavar="SECOND", help="The model that is compared with it.")],
    data: Annotated[list[Path], typer.Argument(metavar="DATA...", help="Files or folders of rows.")],
    metric: Annotated[
        list[str] | None, typer.Option(help="Of answers: exact, f1, number, chrf, …; the first decides. Repeatable.")
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows to generate answers for.")] = 200,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where an answer that does not stop is cut.")] = 128,
    max_length: Annotated[int, typer.Option(min=8, help="Longer rows are dropped and counted.")] = 2048,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Rows with both answers, worst first.")] = None,
    shown: Annotated[int, typer.Option(min=0, help="Rows that got worse to show.")] = 5,
    columns: Annotated[
        list[str] | None,
        typer.Option(help="Another name of a key, as question=prompt; by default those of the runs."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document: scores, differences, rows.")] = False,
) -> None:
    """SECOND beside FIRST on the same rows: loss and metrics of generated answers, with 95 % intervals.

    Differences are paired: both models answer the same rows, so rows that are hard for both do not blur them. Classes
    and pairs are compared by accuracy. The rows that got worse come first.

    Example: lmtune compare Qwen/Qwen3-0.6B runs/support heldout.jsonl --metric f1
    """
    from lmtune.evaluation.answer_metrics import answer_metric

    metrics, paths = [answer_metric(name) for name in metric or METRICS], tuple(str(path) for path in data)
    named = columns_of(columns or [])
    known = columns_for(run_of(first), paths, named) or columns_for(run_of(second), paths, named)
    check_data(paths, columns=known)
    with progress("loading PyTorch and the libraries"):
        from lmtune.evaluation.compare import compare, row_results
        from lmtune.evaluation.tables import comparison_table, describe_worse
        from lmtune.inference.load import load_for_inference

    found = [
        row_results(load_for_inference(one), paths, rows, max_new_tokens, max_length, columns=known)
        for one in (first, second)
    ]
    compared = compare(*found, metrics)
    lines = [_row(row) for row in compared.rows]
    if output is not None:
        write_text(output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        err.print(f"{pluralize(len(lines))} in {escape(str(output))}")
    if compared.left_out:
        warn(f"{pluralize(compared.left_out)} that only one of the two could read are left out (--max-length)")
    if as_json:
        differences = {name: {**vars(one), "verdict": one.verdict} for name, one in compared.differences.items()}
        print_json({"scores": compared.scores, "differences": differences, "rows": lines})
        return
    out.print(comparison_table(first, second, compared))
    out.print(escape(f"{compared.deciding}: {compared.differences[compared.deciding].sentence(second)}"))
    for text in describe_worse(compared, shown):
        out.print(text)


def _row(row: Any) -> dict[str, Any]:
    """A row of both models for a file."""
    one, other = row.first, row.second
    answers = {"question": one.question, "reference": one.reference, "first": one.answer, "second": other.answer}
    known = answers if one.answer is not None else {"first": one.is_right, "second": other.is_right}
    return {"row": one.location, "gain": row.gain, **(known if one.loss is None or one.answer is not None else {})}


if __name__ == "__main__":
    run(main)
