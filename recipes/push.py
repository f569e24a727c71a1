"""Upload what a run has trained to the Hugging Face Hub, with a card of what was measured.

lmtune push runs/support anna/support
"""

from pathlib import Path
from typing import Annotated

import typer

from lmtune.errors import ConfigError
from lmtune.io.console import err, escape, out, progress
from lmtune.run import run
from lmtune.runs.store import choose_run


def main(
    target: Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or its name in runs/.")],
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository; made if it is not there.")],
    merged: Annotated[bool, typer.Option("--merged", help="The model that `lmtune merge` made, no adapter.")] = False,
    gguf: Annotated[bool, typer.Option("--gguf", help="The GGUF files that `lmtune export` wrote.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="FILE_OR_TYPE", help="With --gguf: this one; may be repeated.")
    ] = None,
    space: Annotated[
        bool, typer.Option("--space", help="A Space: the chat page, its model and lmtune. USER/NAME is the Space's.")
    ] = False,
    public: Annotated[bool, typer.Option("--public", help="Everyone may see it; otherwise only you.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the files; upload nothing.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the files into this new folder; upload nothing.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch other than the main one.")] = None,
    message: Annotated[str | None, typer.Option(help="What the commit says.")] = None,
) -> None:
    """Upload the adapter of RUN as plain PEFT loads it, or its model if that was trained itself, with a model card.

    Or another form of it: --merged, --gguf, or --space. Your Hub token is read from `hf auth login` or HF_TOKEN, and is
    never written anywhere.

    Example: lmtune push runs/support anna/support --dry-run

    Example: lmtune push runs/support anna/support-gguf --gguf --only q4_k_m

    Example: lmtune push runs/support anna/support --space
    """
    if gguf and (merged or space):
        raise ConfigError("--gguf: files for llama.cpp and Ollama alone; leave out --merged and --space")
    if only and not gguf:
        raise ConfigError(f"--only: {only[0]}; expected together with --gguf")
    run_directory = choose_run(target)
    with progress("loading PyTorch and the libraries"):
        from lmtune.export.hub import push
        from lmtune.export.space import prepare_space
        from lmtune.export.uploads import prepare_gguf, prepare_push, write_upload

    with progress("checking the files"):
        if gguf:
            upload = prepare_gguf(run_directory, repository, only or ())
        else:
            upload = (prepare_space if space else prepare_push)(run_directory, repository, merged)

    if dry_run or output is not None:
        for name, size in upload.sizes.items():
            out.print(f"{size:>13,} bytes  {escape(name)}")
        for name in upload.kept_here:
            out.print(f"{'stays here':>19}  {escape(name)}")
        if output is not None:
            write_upload(upload, output)
            err.print(f"written to {escape(str(output))}; nothing was uploaded")
            return
        err.print(f"nothing was uploaded; without --dry-run these {len(upload.sizes)} files go to {escape(repository)}")
        return
    err.print(f"uploading {len(upload.sizes)} files of {escape(str(run_directory.path))} to {escape(repository)} …")
    out.print(escape(push(upload, not public, revision, message)))
    err.print(f"others {'open' if space else 'load'} it with: {escape(upload.use)}")


if __name__ == "__main__":
    run(main)
