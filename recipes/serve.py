"""Serve models with the API of OpenAI: `lmtune serve [RUN_OR_MODEL…]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lmtune.config.options import Base
from lmtune.config.schema import Quantization
from lmtune.io.console import err, escape, progress
from lmtune.recipes.app import newest_run
from lmtune.run import run

EngineKind = Literal["auto", "lmtune", "vllm"]


def main(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]RUN_OR_MODEL",
            help="Runs, adapter or model folders, Hub ids, or `tiny`. Default: the newest run that has ended.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address; any but 127.0.0.1 needs LMTUNE_API_KEY.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port, or the next that is free.")] = 8000,
    base: Base = None,
    quantization: Annotated[
        Quantization | None, typer.Option(help="Of all bases; by default what each adapter was trained over.")
    ] = None,
    engine: Annotated[
        EngineKind, typer.Option(help="What generates; auto is vLLM where there is a GPU and it is installed.")
    ] = "auto",
    vllm_args: Annotated[str, typer.Option(metavar="TEXT", help="Further options for `vllm serve`.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Where an answer is cut if its request does not say.")] = 1024,
    max_requests: Annotated[int, typer.Option(min=1, help="Under way at once; more are told to try again.")] = 256,
    page: Annotated[bool, typer.Option("--page/--no-page", help="The chat page at /.")] = True,
    jobs: Annotated[bool, typer.Option("--jobs/--no-jobs", help="Files and fine-tuning jobs.")] = True,
    runs: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the runs of jobs are.")] = Path("runs"),
    job_defaults: Annotated[
        Path | None, typer.Option(metavar="YAML", help="Sections of a config that every job starts from.")
    ] = None,
) -> None:
    """Serve models with the API of OpenAI, so that programs use them by another base URL.

    Adapters over the same base share it, and all requests share each pass. The key is in LMTUNE_API_KEY; without it one
    is made and shown.

    Example: lmtune serve runs/support base=tiny --port 8000
    """
    with progress("loading PyTorch and the libraries"):
        from lmtune.serve.openai.start import EngineSettings, JobSettings, serve, serving_address

    address = serving_address(host, port)
    targets = models or [newest_run() or "tiny"]
    if not models:
        err.print(f"[dim]no model named, so it is {escape(targets[0])}[/]")
    settings = JobSettings(runs, job_defaults) if jobs else None
    generating = EngineSettings(engine, quantization, base, vllm_args)
    serve(targets, address, generating, max_tokens, max_requests, page, settings)


if __name__ == "__main__":
    run(main)
