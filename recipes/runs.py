"""What was run and how it went.

lmtune runs list
lmtune runs follow support
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lmtune.errors import ConfigError, ModelError
from lmtune.io.console import err, escape, out, print_json
from lmtune.run import run
from lmtune.runs.history import list_runs, overview, overview_tree, results_tree, run_tree
from lmtune.runs.log import follow_steps
from lmtune.runs.store import RunDirectory, choose_run


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
    if action is Action.show and as_json:
        print_json(run_tree(chosen))
    elif action is Action.show:
        from lmtune.runs.tables import print_run

        print_run(chosen)
    elif action is Action.follow:
        print_steps(chosen, as_json)
    elif not chosen.results.is_file():
        raise ModelError(f"{chosen.path}: no results yet; they come with the first step")
    elif as_json:
        print_json(results_tree(chosen))
    else:
        typer.echo(chosen.results.read_bytes(), nl=False)


def print_list(runs_dir: Path, as_json: bool = False) -> None:
    """One line a run, the one written to last first."""
    from lmtune.runs.tables import runs_table

    runs = list_runs(runs_dir)
    if as_json:
        print_json([overview_tree(item) for item in runs])
    elif runs:
        out.print(runs_table(runs, out.width), soft_wrap=False)
    else:
        err.print(f"no runs in {escape(str(runs_dir))}/; `lmtune quickstart` makes one, or give a folder with --dir")


def print_steps(chosen: RunDirectory, as_json: bool = False) -> None:
    """Every step so far, then each new one until the run ends or Ctrl-C leaves."""
    try:
        for step in follow_steps(chosen):
            if as_json:
                sys.stdout.write(json.dumps(asdict(step)) + "\n")
                sys.stdout.flush()
                continue
            rate = step.tokens / max(1e-9, step.seconds)
            out.print(f"step {step.step} · epoch {step.epoch:.2f} · loss {step.loss:.4f} · {rate:,.0f} tok/s")
    except KeyboardInterrupt:
        err.print("left; the run itself continues")
        return
    item = overview(chosen)
    err.print(f"{escape(item.name)} is {escape(item.status)}" + (f" at step {item.steps}" if item.steps else ""))


if __name__ == "__main__":
    run(main)
