"""Talk to a model in the terminal: `lmtune chat RUN_OR_MODEL`. What happens at the prompt is `lmtune.ui.terminal`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lmtune.cli import run
from lmtune.errors import ConfigError


def main(
    model: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, adapter or model folder, a Hub id, or `tiny`.")
    ],
    system: Annotated[str | None, typer.Option(help="System prompt; by default that of training.")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token; 1 varies as learned.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this total probability.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Where an answer that does not stop is cut.")] = 256,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal answers.")] = 0,
    base: Annotated[bool, typer.Option("--base", help="Answer without the adapter.")] = False,
) -> None:
    """Talk to a model in the terminal; with a pipe as input, answer one question a line.

    Example: lmtune chat quickstart --temperature 0.7
    """
    from lmtune.generation import ChatSession, GenerationOptions

    options = GenerationOptions(temperature, top_p, max_new_tokens, seed)

    from lmtune.models.inference import load_for_inference
    from lmtune.ui.terminal import TerminalChat

    loaded = load_for_inference(model)
    if base and not loaded.has_adapter:
        raise ConfigError(f"--base: {model} has no adapter, so it is the base already; leave --base out")
    chat = TerminalChat(ChatSession(loaded, system), options, base)
    if sys.stdin.isatty():
        chat.run_interactive()
    else:
        chat.run_piped(sys.stdin.buffer)


if __name__ == "__main__":
    run(main)
