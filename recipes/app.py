"""Chat with a model in the browser: `lmtune app [RUN_OR_MODEL…]`, the same as `python app.py`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from lmtune.config.load import load_config
from lmtune.config.options import Base
from lmtune.config.schema import FinetuneConfig, sources_of
from lmtune.errors import LmtuneError
from lmtune.io.console import err, escape, progress
from lmtune.run import run
from lmtune.runs.store import RunDirectory, find_run

_ABOUT_THE_SHOP = (
    "Where do customers park their cars?",
    "When will the delivery come?",
    "What gift cards can I buy?",
    "Is the shop closed during lunch?",
)
_ABOUT_THE_WORLD = ("Hello!", "What is the opposite of hot?", "What colour is the sky?", "What can you do?")


def main(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="Runs, adapter or model folders, Hub ids, or `tiny`. Default: the newest run that has ended.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to serve at; any but 127.0.0.1 needs --auth.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port, or the next that is free.")] = 7860,
    share: Annotated[bool, typer.Option("--share", help="Also by a public link; needs --auth.")] = False,
    base: Base = None,
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
        from lmtune.inference.chat import check_chats
        from lmtune.inference.load import load_for_inference

    targets = models or [newest_run() or "tiny"]
    if not models:
        err.print(f"[dim]no model named, so it is {escape(targets[0])}[/]")
    loaded = [load_for_inference(target, base=base) for target in targets]
    for model in loaded:
        check_chats(model)
        if model.date_note:
            err.print(f"[dim]{escape(model.name)}: {escape(model.date_note)}[/]")
    launch(loaded, address, [example_questions(target) for target in targets])


def newest_run(folder: str | Path = "runs") -> str | None:
    """The path of the run in `folder` whose adapter or model was saved last; None if there is none."""
    files = ("*/adapter/adapter_config.json", "*/merged/config.json")
    saved = [path for file in files for path in Path(folder).glob(file) if RunDirectory(path.parents[1]).exists()]
    return str(max(saved, key=lambda path: path.stat().st_mtime).parents[1]) if saved else None


def example_questions(target: str) -> tuple[str, ...]:
    """Questions that show what `target` can do, where it is a model of the embedded demo; none for other models."""
    if target == "tiny":
        return _ABOUT_THE_WORLD
    run = find_run(target)
    if run is None:
        return ()
    try:
        config = load_config(FinetuneConfig, run.config)
    except LmtuneError:  # whoever loads the model says what is wrong with the run
        return ()
    names = [os.path.basename(source.path) for source in sources_of(config.data.train)]
    is_shop = config.model.name == "tiny" and "support.jsonl" in names
    return _ABOUT_THE_SHOP if is_shop else ()


if __name__ == "__main__":
    run(main)
