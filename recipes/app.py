"""Chat with a model in the browser: `lmtune app [RUN_OR_MODEL…]`, the same as `python app.py`."""

from __future__ import annotations

from typing import Annotated

import typer

from lmtune.cli import run
from lmtune.io.console import err, escape, progress


def main(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="Runs, adapter or model folders, Hub ids, or `tiny`. Default: the newest run with an adapter.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to serve at; any but 127.0.0.1 needs --auth.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port, or the next that is free.")] = 7860,
    share: Annotated[bool, typer.Option("--share", help="Also by a public link; needs --auth.")] = False,
    base: Annotated[
        str | None, typer.Option(metavar="FOLDER_OR_ID", help="Where the base of the adapters is now.")
    ] = None,
    auth: Annotated[
        str | None, typer.Option(metavar="USER:PASSWORD", envvar="LMTUNE_AUTH", help="Who may use the app.")
    ] = None,
) -> None:
    """Chat with a model in the browser; with several models, choose among them on the page.

    Example: lmtune app runs/quickstart
    """
    with progress("loading the app"):
        from lmtune.serve.server import Address, in_space, launch

    address = Address("0.0.0.0" if in_space() else host, port, share, auth)

    with progress("loading PyTorch and the libraries"):
        from lmtune.inference.load import load_for_inference
        from lmtune.serve.studio.choice import example_questions, newest_run

    targets = models or [newest_run() or "tiny"]
    if not models:
        err.print(f"[dim]no model named, so it is {escape(targets[0])}[/]")
    loaded = [load_for_inference(target, base=base) for target in targets]
    for model in loaded:
        if model.date_note:
            err.print(f"[dim]{escape(model.name)}: {escape(model.date_note)}[/]")
    launch(loaded, address, [example_questions(target) for target in targets])


if __name__ == "__main__":
    run(main)
