"""Score a model on rows with known answers: base and tuned side by side, on one loaded model.

lmtune evaluate runs/support heldout.jsonl
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lmtune.data.checking import check_data
from lmtune.data.columns import columns_of
from lmtune.errors import ConfigError
from lmtune.io.atomic import write_text
from lmtune.io.console import escape, out, print_json, progress, warn
from lmtune.run import run
from lmtune.runs.columns import columns_for, run_of


def main(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, an adapter, a model folder or Hub id.")],
    data: Annotated[list[Path], typer.Argument(metavar="DATA...", help="Files or folders of rows.")],
    exact_match_rows: Annotated[int, typer.Option(min=0, help="Rows to generate answers for.")] = 200,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where an answer that does not stop is cut.")] = 128,
    max_length: Annotated[int, typer.Option(min=8, help="Longer rows are dropped and counted.")] = 2048,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One JSON document: base, tuned, standard_errors, trained_rows, data."),
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
    """Loss, perplexity, token and sequence accuracy, and exact match of generated answers; of classes F1 and confusion.

    With a run, rows that it was trained on are counted and warned about.

    Example: lmtune evaluate runs/support heldout.jsonl
    """
    paths = tuple(str(path) for path in data)
    known = columns_for(run_of(target), paths, columns_of(columns or []))
    check_data(paths, columns=known)

    with progress("loading PyTorch and the libraries"):
        from lmtune.data.report import describe_part
        from lmtune.evaluation.scoring import evaluate_loaded
        from lmtune.inference.load import load_for_inference
        from lmtune.runs.tables import describe_scores, print_classes, scores_table

    loaded = load_for_inference(target, base=base)
    scored = evaluate_loaded(loaded, paths, exact_match_rows, max_new_tokens, max_length, known)
    errors = {"tuned": scored.tuned.standard_errors, "base": scored.base.standard_errors if scored.base else None}
    before, tuned = scored.base.as_dict() if scored.base else None, scored.tuned.as_dict()
    classes = None if scored.tuned.classes is None else asdict(scored.tuned.classes)
    if confusion is not None:
        write_text(confusion, _drawn(classes))
    if scored.trained_rows:
        warn(f"{scored.trained_rows} of {tuned['rows']} rows were trained on; their scores say nothing of new ones")
    if as_json:
        known = {"standard_errors": errors, "trained_rows": scored.trained_rows, "data": scored.report.to_dict()}
        answers = [{"question": a.question, "reference": a.reference, "answer": a.prediction} for a in scored.answers]
        own = {} if classes is None else {"classes": classes}
        print_json({"base": before, "tuned": tuned, **own, **known, "answers": answers})
        return
    out.print(escape("\n".join(describe_part(scored.report))))
    out.print(scores_table(before, tuned))
    for line in describe_scores(before, tuned, {name: known for name, known in errors.items() if known}):
        out.print(escape(line))
    print_classes(classes)


def _drawn(classes: dict[str, Any] | None) -> str:
    """The picture; ConfigError where there is no such matrix."""
    from lmtune.runs.pictures import confusion_svg

    picture = None if classes is None else confusion_svg(classes)
    if picture is None:
        raise ConfigError("--confusion: only a model that gives one class a row has a confusion matrix; leave it out")
    return picture


if __name__ == "__main__":
    run(main)
