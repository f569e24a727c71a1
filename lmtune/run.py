"""Runs a command: the one place where errors become text and exit codes.

    if __name__ == "__main__":
        run(main)

Exit codes: 0 done; 1 failed while running; 2 the usage, config, data or model is wrong (one message, nothing
written); 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP. `LMTUNE_TRACEBACK=1` shows the traceback of any error.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand

from lmtune.errors import LmtuneError, is_failure
from lmtune.io.atomic import DISK_ERRORS
from lmtune.io.console import err, escape, program, tolerate_closed_stderr
from lmtune.parallel.worker import note_exit_code


class Command(TyperCommand):
    """A verb. An option whose metavar ends in `...` takes all words `key=value` behind it: `--over a=1..2 b=3,4`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        several = {name for one in self.params if str(one.metavar or "").endswith("...") for name in one.opts}
        words, option = list[str](), None
        for word in args:
            if word.startswith("-"):
                option = word if word in several else None
            elif option is not None and words[-1] != option and "=" in word:
                words.append(option)
            elif option is not None and words[-1] != option:
                option = None
            words.append(word)
        parsed: list[str] = super().parse_args(ctx, words)
        return parsed


def run(recipe: Callable[..., None]) -> NoReturn:
    """Run one recipe's `main` on the command line's arguments, as `python recipes/VERB.py …` does."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(cls=Command)(recipe)
    run_app(app)


def run_app(app: typer.Typer) -> NoReturn:
    """Call `app`, and end the process with the exit code that its outcome stands for."""
    tolerate_closed_stderr()
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
    except BaseException as error:
        if not is_failure(error):
            raise
        if isinstance(error, OSError) and error.filename is not None and error.errno in DISK_ERRORS:
            _show(
                error, f"{error.filename}: {error.strerror}; make room or permit it, then start the same command again"
            )
        else:
            _show(error, f"{type(error).__name__}: {error}\n  (LMTUNE_TRACEBACK=1 shows where)")
        return 1
    return 0


def _show(error: BaseException, message: str) -> None:
    if os.environ.get("LMTUNE_TRACEBACK") == "1":
        traceback.print_exception(error)
    called = program()
    named = re.sub(r"`lmtune (?=[a-z])", lambda _: f"`{called} ", message)
    err.print(f"[bold red]error:[/] {escape(named)}")
