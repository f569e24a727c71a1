"""Score a model on rows with known answers: base and tuned side by side, on one loaded model.

lmtune evaluate runs/support heldout.jsonl
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from lmtune.cli import run
from lmtune.console import escape, out, progress
from lmtune.data.checking import check_data


def main(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, an adapter, a model folder or Hub id.")],
    data: Annotated[list[Path], typer.Argument(metavar="DATA...", help="Files or folders of rows.")],
    exact_match_rows: Annotated[int, typer.Option(min=0, help="Rows to generate answers for.")] = 200,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where an answer that does not stop is cut.")] = 128,
    max_length: Annotated[int, typer.Option(min=8, help="Longer rows are left out, and counted.")] = 2048,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Loss, perplexity, token and sequence accuracy, and exact match of generated answers.

    Example: lmtune evaluate runs/quickstart examples/support_heldout.jsonl
    """
    paths = tuple(str(path) for path in data)
    check_data(paths)

    with progress("loading PyTorch and the libraries"):
        from lmtune.data.fates import describe_fates
        from lmtune.evaluation import evaluate_loaded
        from lmtune.models.inference import load_for_inference
        from lmtune.report import scores_table

    scored = evaluate_loaded(load_for_inference(target), paths, exact_match_rows, max_new_tokens, max_length)
    base, tuned = scored.base.as_dict() if scored.base else None, scored.tuned.as_dict()
    if as_json:
        typer.echo(json.dumps({"base": base, "tuned": tuned}, indent=2))
        return
    out.print(escape(describe_fates(scored.fates)))
    out.print(scores_table(base, tuned))


if __name__ == "__main__":
    run(main)
