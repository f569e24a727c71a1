"""Write what a model says of each row: its class and probabilities, a value, a reward, or an answer.

lmtune predict runs/reviews new.jsonl -o predictions.jsonl
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from lmtune.config.options import Base
from lmtune.data.columns import columns_of
from lmtune.io.atomic import write_text
from lmtune.io.console import err, escape, progress
from lmtune.io.text import pluralize
from lmtune.run import run


def main(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, an adapter, a model folder or Hub id.")],
    data: Annotated[list[Path], typer.Argument(metavar="DATA...", help="Files or folders of rows.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; else they are printed.")] = None,
    max_length: Annotated[int, typer.Option(min=8, help="Of longer rows a classifier reads the last tokens.")] = 2048,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where an answer that does not stop is cut.")] = 128,
    columns: Annotated[
        list[str] | None,
        typer.Option(help="Another name of a key, as question=prompt; by default those of the run's data.columns."),
    ] = None,
    vote: Annotated[bool, typer.Option("--vote", help="Of an ensemble: count votes, not the mean.")] = False,
    base: Base = None,
) -> None:
    """The rows of DATA with `prediction` beside their keys, one JSON object a line, in their order.

    A row has `text`, `prompt`, `messages` or `conversations`, and a label or not. A classifier writes `prediction`,
    `probability` and `probabilities`, a reward model `prediction`, or of a pair `reward_chosen` and `reward_rejected`,
    a language model its greedy answer.

    Example: lmtune predict runs/reviews new.jsonl -o predictions.jsonl
    """
    named = columns_of(columns or [])
    with progress("loading PyTorch and the libraries"):
        from lmtune.evaluation.predict import predict
        from lmtune.inference.load import load_for_inference

    loaded = load_for_inference(target, base=base, method="vote" if vote else None)
    rows = predict(loaded, data, max_length, max_new_tokens, named)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    if output is None:
        typer.echo("".join(lines), nl=False)
    else:
        write_text(output, "".join(lines))
        err.print(f"{pluralize(len(lines))} in {escape(str(output))}")


if __name__ == "__main__":
    run(main)
