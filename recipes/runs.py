"""What was run and how it went; stop a run, delete one.

lmtune runs list
lmtune runs follow support
lmtune runs compare first second
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lmtune.errors import ConfigError
from lmtune.run import run
from lmtune.runs import actions
from lmtune.runs.store import choose_run


class Action(StrEnum):
    """What to do with the runs."""

    list = "list"
    show = "show"
    follow = "follow"
    results = "results"
    compare = "compare"
    cancel = "cancel"
    rm = "rm"


OF_ONE = {
    Action.show: actions.show, Action.follow: actions.follow, Action.results: actions.results,
    Action.cancel: actions.stop,
}  # fmt: skip
# How each is called, and the least and the greatest number of runs that it takes
USAGE = {
    Action.list: ("", 0, 0), Action.compare: (" FIRST SECOND", 2, None), Action.rm: (" NAME", 1, None),
    **dict.fromkeys(OF_ONE, (" NAME", 1, 1)),
}  # fmt: skip


def main(
    action: Annotated[Action, typer.Argument(help="What to do; see above.")] = Action.list,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Runs: names, or folders.")] = None,
    runs_dir: Annotated[Path, typer.Option("--dir", help="Where runs are kept.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document; follow: one object an event.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="rm: delete without asking.")] = False,
) -> None:
    """List the runs, look at one, compare several, stop one, or delete some.

    list: a line for each run. show: its settings and scores. follow: what happens, until it ends. results: CSV of the
    steps. compare: settings that differ, beside the scores. cancel: the run ends its step, saves and stops; the same
    command resumes it. rm: delete.

    Example: lmtune runs show support

    Example: lmtune runs compare first second third
    """
    given = names or []
    words, least, most = USAGE[action]
    if len(given) < least or (most is not None and len(given) > most):
        which = "another folder is listed with --dir" if action is Action.list else (
            f"which {'run' if least == 1 else 'runs'}? `lmtune runs list` shows the names")  # fmt: skip
        raise ConfigError(f"write lmtune runs {action.value}{words}; {which}")
    if action is Action.list:
        actions.show_list(runs_dir, as_json)
    elif action is Action.rm:
        actions.remove(given, runs_dir, as_json, yes)
    elif action is Action.compare:
        actions.show_comparison([choose_run(name, runs_dir) for name in given], as_json)
    else:
        OF_ONE[action](choose_run(given[0], runs_dir), as_json)


if __name__ == "__main__":
    run(main)
