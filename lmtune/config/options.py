"""The config on a command line, as every command that takes one takes it, and what `--help` says of it."""

from __future__ import annotations

from typing import Annotated

import typer

ConfigFile = Annotated[
    str | None,
    typer.Argument(metavar="[CONFIG]", help="A YAML file, or the name of a shipped one: qwen3_0.6b, support."),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace those of the file.")
]
BaseModel = Annotated[str | None, typer.Option(help="The base model; short for model.name=…")]
TrainRows = Annotated[list[str] | None, typer.Option(help="Rows to train on; short for data.train=…")]
Base = Annotated[str | None, typer.Option(metavar="FOLDER_OR_ID", help="Where the base model is now, if it was moved.")]
