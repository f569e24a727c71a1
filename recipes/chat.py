"""Talk to a model in the terminal: `lmtune chat RUN_OR_MODEL`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lmtune.config.options import Base
from lmtune.errors import ConfigError
from lmtune.io.console import err, escape, progress
from lmtune.run import run


def main(
    model: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, adapter or model folder, a Hub id, or `tiny`.")
    ],
    system: Annotated[str | None, typer.Option(help="System prompt; by default that of training.")] = None,
    temperature: Annotated[float, typer.Option(help="0 = greedy: the most probable token; higher: more varied.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling threshold; lower: no improbable tokens.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Where an answer is cut.")] = 256,
    seed: Annotated[int, typer.Option(help="Of sampling: equal seeds give equal answers.")] = 0,
    vote: Annotated[bool, typer.Option("--vote", help="Of an ensemble: count votes, not the mean.")] = False,
    base: Base = None,
    without_adapter: Annotated[bool, typer.Option("--without-adapter", help="Let the base model answer.")] = False,
    conversation: Annotated[
        bool, typer.Option("--conversation", help="The lines of a pipe are one conversation, not each asked alone.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line: question, answer, tokens, finish_reason.")
    ] = False,
) -> None:
    """Talk to a model in the terminal; with a pipe as input, answer one question a line, each as if asked alone.

    In a pipe with --conversation each line goes on with those before; where that outgrows what the model can read, the
    oldest turns are left out. A line that cannot be answered is named at the end, and the others are answered.

    Example: lmtune chat quickstart --temperature 0.7

    Example: lmtune chat quickstart --json < questions.txt > answers.jsonl
    """
    with progress("loading PyTorch and the libraries"):
        from lmtune.inference.chat import ChatSession
        from lmtune.inference.load import load_for_inference
        from lmtune.inference.request import Sampling
        from lmtune.serve.terminal import TerminalChat

    sampling = Sampling(temperature, top_p, max_new_tokens, seed)
    loaded = load_for_inference(model, base=base, method="vote" if vote else None)
    if without_adapter and not loaded.has_adapter:
        raise ConfigError(f"--without-adapter: {model} has no adapter, so it is the base already; leave it out")
    if loaded.date_note:
        err.print(f"[dim]{escape(loaded.date_note)}[/]")
    chat = TerminalChat(ChatSession(loaded, system), sampling, without_adapter)
    if sys.stdin.isatty() and not as_json:
        chat.run_interactive()
    else:
        chat.run_piped(sys.stdin.buffer, conversation, as_json)


if __name__ == "__main__":
    run(main)
