"""The `lmtune` command: each verb runs the recipe of that name, and this is where errors become text and exit codes.

    lmtune finetune CONFIG        is        accelerate launch recipes/finetune.py CONFIG

Exit codes: 0 done; 1 failed while running; 2 the usage, config, data or model is wrong (one message, nothing
written); 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP. `LMTUNE_TRACEBACK=1` shows the traceback of any error.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from lmtune import __version__
from lmtune.errors import LmtuneError, is_failure
from lmtune.io.console import err, escape, keep_without_stderr, program
from lmtune.parallel.worker import note_exit_code

VERBS = (
    "quickstart", "init", "check", "preview", "plan", "finetune", "evaluate", "merge", "chat", "app", "push", "pull",
    "pretrain", "runs", "doctor", "schema",
)  # fmt: skip

# What other tools call these verbs
_MEANT = {
    "train": "finetune", "tune": "finetune", "fine-tune": "finetune", "fit": "finetune", "sft": "finetune",
    "eval": "evaluate", "score": "evaluate", "test": "evaluate", "validate": "check", "tokens": "preview",
    "new": "init", "config": "init", "fuse": "merge", "export": "merge", "upload": "push", "download": "pull",
    "talk": "chat", "generate": "chat", "predict": "chat", "ui": "app", "web": "app", "serve": "app", "run": "runs",
    "list": "runs", "status": "runs", "estimate": "plan", "memory": "plan", "demo": "quickstart", "help": "--help",
    "version": "--version",
}  # fmt: skip


class _Verbs(TyperGroup):
    """The verbs; a name that other tools have for one is answered by ours."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and (meant := _MEANT.get(args[0].lower())) and args[0] not in self.commands:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {meant!r}?")
        return super().resolve_command(ctx, args)


_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


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
        app.command(verb)(recipe.main)
    _exit_with(app)


def run(recipe: Callable[..., None]) -> NoReturn:
    """Run one recipe's `main` on the command line's arguments, as `python recipes/VERB.py …` does."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(recipe)
    _exit_with(app)


def _exit_with(app: typer.Typer) -> NoReturn:
    """Call `app`, and end the process with the exit code that its outcome stands for."""
    keep_without_stderr()
    code = _outcome(app)
    note_exit_code(code)
    sys.exit(code)


def _outcome(app: typer.Typer) -> int:
    try:
        app(standalone_mode=True)
    except SystemExit as exit_:  # how typer ends, also for usage errors and where the reader of a pipe went away
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except LmtuneError as error:
        _show(error, str(error))
        return error.exit_code
    except KeyboardInterrupt:
        err.print("stopped")
        return 130
    except OSError as error:
        _show(error, _about_file(error))
        return 1
    except BaseException as error:
        if not is_failure(error):
            raise
        _show(error, f"{type(error).__name__}: {error}\n  (LMTUNE_TRACEBACK=1 shows where)")
        return 1
    return 0


def _about_file(error: OSError) -> str:
    """What is wrong with which file, where the disk is full or must not be written."""
    if error.filename is None or error.errno not in _DISK:
        return f"{type(error).__name__}: {error}\n  (LMTUNE_TRACEBACK=1 shows where)"
    return f"{error.filename}: {error.strerror}; make room or permit it, then start the same command again"


def _show(error: BaseException, message: str) -> None:
    if os.environ.get("LMTUNE_TRACEBACK") == "1":
        traceback.print_exception(error)
    called = program()
    named = re.sub(rf"`lmtune (?={'|'.join(VERBS)})", lambda _: f"`{called} ", message)
    err.print(f"[bold red]error:[/] {escape(named)}")
