"""The `lmtune` command: each verb runs the recipe of that name.

lmtune finetune CONFIG        is        accelerate launch recipes/finetune.py CONFIG
"""

from __future__ import annotations

import importlib
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from lmtune import __version__
from lmtune.run import Command, run_app

VERBS = (
    "quickstart", "init", "prepare", "augment", "check", "preview", "plan", "finetune", "sweep", "crossval",
    "ensemble", "evaluate", "predict", "compare", "vote", "merge", "export", "verify", "chat", "app", "serve", "push",
    "pull", "pretrain", "runs", "report", "doctor", "schema",
)  # fmt: skip

# What other tools call these verbs
_MEANT = {
    "train": "finetune", "tune": "finetune", "fine-tune": "finetune", "fit": "finetune", "sft": "finetune",
    "eval": "evaluate", "score": "evaluate", "test": "evaluate", "validate": "check", "tokens": "preview",
    "cross-validate": "crossval", "cv": "crossval", "kfold": "crossval",
    "search": "sweep", "tune-settings": "sweep", "optimize": "sweep", "hpo": "sweep",
    "new": "init", "config": "init", "fuse": "merge", "convert": "export", "gguf": "export", "upload": "push",
    "download": "pull", "diff": "compare", "talk": "chat", "generate": "chat", "classify": "predict",
    "infer": "predict", "ui": "app", "web": "app", "server": "serve", "api": "serve", "run": "runs",
    "list": "runs", "status": "runs", "estimate": "plan", "memory": "plan", "demo": "quickstart", "help": "--help",
    "version": "--version",
}  # fmt: skip


class _Verbs(TyperGroup):
    """The verbs; a name that other tools have for one is answered by ours."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and (meant := _MEANT.get(args[0].lower())) and args[0] not in self.commands:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {meant!r}?")
        return super().resolve_command(ctx, args)


def main() -> NoReturn:
    """The console script."""
    app = typer.Typer(
        name="lmtune", cls=_Verbs, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
        help="Fine-tune a language model on your own questions and answers. Begin with: lmtune quickstart",
        epilog="Each verb explains itself: lmtune finetune --help",
    )  # fmt: skip

    @app.callback(invoke_without_command=True)
    def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
        if version:
            typer.echo(f"lmtune {__version__}")
            raise typer.Exit

    for verb in VERBS:
        recipe = importlib.import_module(f"lmtune.recipes.{verb}")
        app.command(verb, cls=Command)(recipe.main)
    run_app(app)
