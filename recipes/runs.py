"""What was run and how it went.

lmtune runs list
lmtune runs follow support
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lmtune.cli import run
from lmtune.errors import ConfigError
from lmtune.runs.history import choose_run
from lmtune.serve.studio.run_views import print_list, print_results, print_run, print_steps


class Action(StrEnum):
    """What to do with the runs."""

    list = "list"
    show = "show"
    follow = "follow"
    results = "results"


def main(
    action: Annotated[
        Action, typer.Argument(help="list all runs; show, follow or print the results of one.")
    ] = Action.list,
    name: Annotated[str | None, typer.Argument(help="The run: its name, or its folder.")] = None,
    runs_dir: Annotated[Path, typer.Option("--dir", help="Where runs are kept.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document; follow: one object a step.")] = False,
) -> None:
    """List the runs, or look at one: settings and scores (show), steps as they come (follow), CSV (results).

    Example: lmtune runs show support
    """
    if action is Action.list:
        print_list(runs_dir, as_json)
        return
    if name is None:
        raise ConfigError(f"which run? Write lmtune runs {action.value} NAME; `lmtune runs list` shows the names")
    chosen = choose_run(name, runs_dir)
    {Action.show: print_run, Action.follow: print_steps, Action.results: print_results}[action](chosen, as_json)


if __name__ == "__main__":
    run(main)
