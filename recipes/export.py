"""Write a run's model for another engine: llama.cpp and LM Studio (gguf), Ollama, or vLLM.

lmtune export runs/support --to gguf --type q4_k_m
lmtune export runs/support --to vllm --adapter
"""

from pathlib import Path
from typing import Annotated

import typer

from lmtune.config.options import Base
from lmtune.errors import ConfigError
from lmtune.export.base import Engine, Kind, Request
from lmtune.io.console import err, escape, progress
from lmtune.run import run
from lmtune.runs.store import choose_run, require_possible


def main(
    target: Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or its name in runs/.")],
    to: Annotated[Engine, typer.Option(help="The engine: gguf is a file of llama.cpp's format.")] = "gguf",
    kind: Annotated[Kind | None, typer.Option("--type", help="Of the weights in GGUF; q8_0.")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="The adapter alone, to be served over its base.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File or folder; else in the run's.")] = None,
    base: Base = None,
) -> None:
    """Export RUN for another engine, with its chat template and the stop tokens that it was trained with.

    The merged model is exported; it is made and verified first if it is not there. What the engine cannot hold is
    refused with the reason.

    Example: lmtune export runs/support --to ollama --type q4_k_m
    """
    chosen = choose_run(target)
    if kind is not None and (adapter or to == "vllm"):
        raise ConfigError(f"--type: {kind}; only a merged model in GGUF has one, an adapter keeps what was trained")
    if output is not None:
        require_possible(output, "--output")
    with progress("loading PyTorch and the libraries"):
        from lmtune.export.engines import EXPORTERS

    for line in EXPORTERS[to](Request(chosen, kind or "q8_0", adapter, output, base)):
        err.print(escape(line))


if __name__ == "__main__":
    run(main)
