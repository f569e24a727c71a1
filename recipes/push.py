"""Upload what a run has trained to the Hugging Face Hub, with a card of what was measured.

lmtune push runs/support anna/support
"""

from typing import Annotated

import typer

from lmtune.config.load import load_config
from lmtune.config.schema import FinetuneConfig, LoraConfig
from lmtune.io.console import err, escape, out
from lmtune.run import run
from lmtune.runs.store import choose_run


def main(
    target: Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or its name in runs/.")],
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository; made if it is not there.")],
    public: Annotated[bool, typer.Option("--public", help="Everyone may see it; otherwise only you.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the files; upload nothing.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch other than the main one.")] = None,
    message: Annotated[str | None, typer.Option(help="What the commit says.")] = None,
) -> None:
    """Upload the adapter of RUN as plain PEFT loads it, or its model if that was trained itself, with a model card.

    Your Hub token is read from `hf auth login` or HF_TOKEN, and is never written anywhere.

    Example: lmtune push runs/support anna/support --dry-run
    """
    from lmtune.export.hub import prepare_push, push

    run_directory = choose_run(target)

    if dry_run:
        upload = prepare_push(run_directory, repository)
        for name, size in upload.sizes.items():
            out.print(f"{size:>13,} bytes  {escape(name)}")
        for name in upload.kept_here:
            out.print(f"{'stays here':>19}  {escape(name)}")
        err.print(f"nothing was uploaded; without --dry-run these {len(upload.sizes)} files go to {escape(repository)}")
        return
    tuning = load_config(FinetuneConfig, run_directory.config).tuning
    err.print(f"uploading {escape(str(run_directory.result(tuning)))} to {escape(repository)} …")
    address = push(run_directory, repository, private=not public, revision=revision, message=message)
    out.print(escape(address))
    verb = "pull" if isinstance(tuning, LoraConfig) else "chat"
    err.print(f"others load it with: lmtune {verb} {escape(repository)}")


if __name__ == "__main__":
    run(main)
