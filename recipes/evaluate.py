"""Score a model on rows with known answers: base and tuned side by side, on one loaded model.

lmtune evaluate runs/support heldout.jsonl --metric f1 --by topic
"""

from pathlib import Path
from typing import Annotated

import typer

from lmtune.data.checking import check_data
from lmtune.data.columns import columns_of
from lmtune.errors import ConfigError
from lmtune.io.console import escape, out, print_json, progress, warn
from lmtune.run import run
from lmtune.runs.columns import columns_for, run_of


def main(
    target: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, model or Hub id; or a file that `predict` wrote.")
    ],
    data: Annotated[list[Path] | None, typer.Argument(metavar="DATA...", help="Files or folders of rows.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Of answers: f1, number, chrf, …; the first decides. Repeatable.")
    ] = None,
    by: Annotated[str | None, typer.Option(metavar="FIELD", help="Slices: a field, length or source.")] = None,
    exact_match_rows: Annotated[int, typer.Option(min=0, help="Rows to generate answers for.")] = 200,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where an answer that does not stop is cut.")] = 128,
    max_length: Annotated[int, typer.Option(min=8, help="Longer rows are dropped and counted.")] = 2048,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Rows as JSONL, those that got worse first.")
    ] = None,
    shown: Annotated[int, typer.Option(min=0, help="Rows that got worse to show.")] = 3,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document: base, tuned, intervals, differences, slices, rows, …")
    ] = False,
    confusion: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Of a classifier: draw the confusion matrix into this file.")
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(help="Another name of a key, as question=prompt; by default those of the run's data.columns."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="FOLDER_OR_ID", help="Where the base model is now, if it was moved.")
    ] = None,
) -> None:
    """Loss, accuracies and metrics of generated answers with 95 % intervals; of classes F1 and confusion.

    A tuned model stands beside its base, and the rows that got worse come first. With a run, rows that it was trained
    on are counted and warned about.

    Example: lmtune evaluate runs/support heldout.jsonl --metric f1 --by topic
    """
    from lmtune.evaluation.answer_files import is_answer_file
    from lmtune.evaluation.answer_metrics import answer_metrics
    from lmtune.evaluation.showing import draw_confusion, evaluate_file, evaluation_tree, print_evaluation, write_rows

    metrics, named = answer_metrics(metric, ("f1", "chrf")), columns_of(columns or [])
    if is_answer_file(target):
        if data:
            raise ConfigError(f"{target} holds answers and the rows that they are of; leave {data[0]} out")
        evaluate_file(target, metrics, by, output, as_json, named)
        return
    if not data:
        raise ConfigError("DATA: missing; give files or folders of rows with known answers")
    paths = tuple(str(path) for path in data)
    known = columns_for(run_of(target), paths, named)
    check_data(paths, columns=known)
    with progress("loading PyTorch and the libraries"):
        from lmtune.data.report import describe_part
        from lmtune.evaluation.evaluate import evaluate_loaded
        from lmtune.inference.load import load_for_inference
        from lmtune.runs.tables import print_classes

    loaded = load_for_inference(target, base=base)
    found = evaluate_loaded(loaded, paths, exact_match_rows, max_new_tokens, max_length, known, metrics, by)
    tree = evaluation_tree(found)
    if confusion is not None:
        draw_confusion(confusion, tree.get("classes"))
    if found.trained_rows:
        warn(f"{found.trained_rows} of {found.tuned.rows} rows were trained on; their scores say nothing of new ones")
    write_rows(output, tree["rows"])
    if as_json:
        print_json(tree)
        return
    out.print(escape("\n".join(describe_part(found.report))))
    print_evaluation(found, metrics, shown, by)
    print_classes(tree.get("classes"))


if __name__ == "__main__":
    run(main)
