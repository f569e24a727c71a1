"""What was run and how it went.

lmtune runs list
lmtune runs follow support
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lmtune.cli import run
from lmtune.console import err, escape, out
from lmtune.errors import ConfigError, ModelError
from lmtune.history import choose_run, describe_rows, follow_steps, list_runs, overview
from lmtune.runs import RunDirectory


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
) -> None:
    """List the runs, or look at one: settings and scores (show), steps as they come (follow), CSV (results).

    Example: lmtune runs show support
    """
    if action is Action.list:
        print_list(runs_dir)
        return
    if name is None:
        raise ConfigError(f"which run? Write lmtune runs {action.value} NAME; `lmtune runs list` shows the names")
    chosen = choose_run(name, runs_dir)
    {Action.show: print_run, Action.follow: print_steps, Action.results: print_results}[action](chosen)


def print_list(runs_dir: Path) -> None:
    """One line a run, the one written to last first."""
    from lmtune.report import runs_table

    runs = list_runs(runs_dir)
    if runs:
        out.print(runs_table(runs, out.width), soft_wrap=False)
    else:
        err.print(f"no runs in {escape(str(runs_dir))}/; `lmtune quickstart` makes one, or give a folder with --dir")


def print_run(chosen: RunDirectory) -> None:
    """Scores, figures, settings and what became of the rows."""
    from lmtune.report import scores_table

    item, summary = overview(chosen), chosen.read_summary()
    out.print(f"[bold]{escape(item.name)}[/]  {escape(item.status)}  {item.changed:%Y-%m-%d %H:%M}")
    if reason := summary.get("reason"):
        out.print(escape(str(reason)))
    if summary.get("tuned") or summary.get("base"):
        out.print(scores_table(summary.get("base"), summary.get("tuned") or {}))
    for key, value in summary.items():
        if type(value) in (int, float) and key != "format":
            out.print(f"{escape(key.replace('_', ' '))}: {value:,}")
    out.print(f"\n[bold]settings[/]\n{escape(chosen.config.read_text('utf-8', 'replace').rstrip())}")
    if described := describe_rows(chosen):
        out.print(f"\n[bold]data[/]\n{escape(described)}")


def print_steps(chosen: RunDirectory) -> None:
    """Every step so far, then each new one until the run ends or Ctrl-C leaves."""
    try:
        for step in follow_steps(chosen):
            rate = step["tokens"] / max(1e-9, step["seconds"])
            out.print(f"step {step['step']} · epoch {step['epoch']:.2f} · loss {step['loss']:.4f} · {rate:,.0f} tok/s")
    except KeyboardInterrupt:
        err.print("left; the run itself goes on")
        return
    item = overview(chosen)
    err.print(f"{escape(item.name)} is {escape(item.status)}" + (f" at step {item.steps}" if item.steps else ""))


def print_results(chosen: RunDirectory) -> None:
    """`results.csv` as it is, to read or to pipe on."""
    if not chosen.results.is_file():
        raise ModelError(f"{chosen.path}: no results yet; they come with the first step")
    typer.echo(chosen.results.read_bytes(), nl=False)


if __name__ == "__main__":
    run(main)
