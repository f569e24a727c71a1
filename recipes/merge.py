"""Merge a run's adapter into its base model: a plain model folder that any tool loads, proven equal.

lmtune merge runs/support
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from lmtune.config.options import Base
from lmtune.export.merged import merge_run
from lmtune.run import run
from lmtune.runs.store import choose_run


def main(
    target: Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or its name in runs/.")],
    output: Annotated[Path | None, typer.Option(help="Folder to write; RUN/merged if not given.")] = None,
    into: Annotated[
        Literal["trained", "original"],
        typer.Option(help="trained: the weights that were trained over, dequantized. original: as published."),
    ] = "trained",
    base: Base = None,
    accept_difference: Annotated[
        bool,
        typer.Option(
            "--accept-difference",
            help="Keep the merged model even where its logits differ by more than rounding explains; the card says it.",
        ),
    ] = False,
    dtype: Annotated[
        Literal["stored", "float32"],
        typer.Option(
            help="Of the changed weights. stored: that of the base. float32: twice the size of 16 bit, nothing rounded."
        ),
    ] = "stored",
) -> None:
    """Merge the adapter of RUN into its base, and verify the result against the adapter model.

    Example: lmtune merge runs/support --output support-model
    """
    run_directory = choose_run(target)
    merge_run(run_directory, output or run_directory.merged, into, accept_difference, base, dtype == "float32")


if __name__ == "__main__":
    run(main)
