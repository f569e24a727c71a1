"""Download an adapter or a model from the Hugging Face Hub, checked before anything reads it.

lmtune pull anna/support
"""

from pathlib import Path
from typing import Annotated

import typer

from lmtune.io.console import command, err, escape, out, progress
from lmtune.run import run


def main(
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository on the Hub.")],
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to make; else adapters/ or models/USER--NAME.")] = None,
) -> None:
    """Download the adapter, of lmtune or PEFT, or the model in USER/NAME; safetensors only, and no code.

    Example: lmtune pull anna/support
    """
    with progress(f"downloading {repository}"):
        from lmtune.export.hub import pull

        folder = pull(repository, revision, output)
    out.print(escape(str(folder)))
    err.print(f"talk to it: {escape(command('chat', folder))}")


if __name__ == "__main__":
    run(main)
