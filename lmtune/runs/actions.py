"""What `lmtune runs` does, one function an action; each prints for people, or with `as_json` one JSON document."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lmtune.errors import ConfigError, ModelError
from lmtune.io.console import err, escape, out, print_json, progress
from lmtune.io.questions import confirm
from lmtune.runs.comparison import compare_runs
from lmtune.runs.control import cancel, deletable, delete, wait_until_free
from lmtune.runs.events import event_tree, follow_events
from lmtune.runs.history import RunGroup, grouped, list_runs, overview, overview_tree, results_tree, run_tree
from lmtune.runs.store import RunDirectory
from lmtune.runs.tables import comparison_table, describe_event, print_run, runs_table

_PATIENCE_SECONDS = 30  # for the step and the checkpoint of a run that is asked to stop


def show_list(runs_dir: Path, as_json: bool) -> None:
    """One line a run, the one written to last first."""
    runs = list_runs(runs_dir)
    if as_json:
        print_json([overview_tree(item) for item in runs])
    elif runs:
        items = grouped(runs)
        out.print(runs_table(items, out.width), soft_wrap=False)
        for item in items:
            if isinstance(item, RunGroup):
                err.print(escape(
                    f"{item.name} is shown by its best run, {item.runs[0].name}; all: lmtune runs list --dir "
                    f"{runs_dir / item.name}"
                ))  # fmt: skip
    else:
        err.print(f"no runs in {escape(str(runs_dir))}/; `lmtune quickstart` makes one, or give a folder with --dir")


def show(chosen: RunDirectory, as_json: bool) -> None:
    """Scores, figures, settings and data report of a run."""
    if as_json:
        print_json(run_tree(chosen))
    else:
        print_run(chosen)


def follow(chosen: RunDirectory, as_json: bool) -> None:
    """Every event so far, then each new one until the run ends or Ctrl-C leaves."""
    try:
        for event in follow_events(chosen):
            if as_json:
                sys.stdout.write(json.dumps(event_tree(event)) + "\n")
                sys.stdout.flush()
            else:
                out.print(describe_event(event))
    except KeyboardInterrupt:
        err.print("left; the run itself continues")
        return
    item = overview(chosen)
    err.print(f"{escape(item.name)} is {escape(item.status)}" + (f" at step {item.steps}" if item.steps else ""))


def results(chosen: RunDirectory, as_json: bool) -> None:
    """`results.csv`."""
    if not chosen.results.is_file():
        raise ModelError(f"{chosen.path}: no results yet; they come with the first step")
    if as_json:
        print_json(results_tree(chosen))
    else:
        sys.stdout.write(chosen.results.read_text(encoding="utf-8"))


def show_comparison(runs: Sequence[RunDirectory], as_json: bool) -> None:
    """Settings that differ, scores and cost."""
    found = compare_runs(runs)
    if as_json:
        print_json(found.tree())
        return
    out.print(comparison_table(found), soft_wrap=False)
    for note in found.notes:
        err.print(f"[yellow]warning:[/] {escape(note)}")


def stop(chosen: RunDirectory, as_json: bool) -> None:
    """Ask the process that holds the run to save and stop, and wait a while for it."""
    process = cancel(chosen)
    with progress(f"process {process} ends its step and saves"):
        stopped = wait_until_free(chosen, _PATIENCE_SECONDS)
    item = overview(chosen)
    if as_json:
        print_json({"name": item.name, "process": process, "stopped": stopped, "status": item.status})
    elif stopped:
        at = f" at step {item.steps}" if item.steps else ""
        err.print(f"{escape(item.name)} is {escape(item.status)}{at}; the same command resumes it")
    else:
        err.print(f"{escape(item.name)}: process {process} was asked to stop, and is still at its step")


def remove(names: Sequence[str], runs_dir: Path, as_json: bool, yes: bool) -> None:
    """Delete runs, after a question."""
    found = [deletable(name, runs_dir) for name in names]
    for one in found:
        one.require_free()
    if not yes:
        if as_json:
            raise ConfigError("lmtune runs rm --json asks nothing; add --yes")
        for one in found:
            err.print(escape(one.describe()))
        try:
            agreed = confirm("Delete?", proposed=False)
        except KeyboardInterrupt:  # also where there is nobody to ask
            err.print("nothing deleted; --yes deletes without asking")
            raise
        if not agreed:
            err.print("nothing deleted")
            return
    for one in found:
        delete(one)
    if as_json:
        print_json([{"path": str(one.path), "files": one.files, "bytes": one.size_bytes} for one in found])
    else:
        err.print(f"deleted: {escape(', '.join(str(one.path) for one in found))}")
