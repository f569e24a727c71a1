"""What works on this machine, and how to fix the rest.

lmtune doctor
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lmtune.doctor import examine
from lmtune.io.console import err, escape, out, print_json
from lmtune.io.text import pluralize
from lmtune.run import run

COLORS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def main(
    runs_dir: Annotated[Path, typer.Option("--dir", help="Where runs would be kept.")] = Path("runs"),
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document: works, findings (name, level, text, fix).")
    ] = False,
) -> None:
    """Look at versions, devices, quantization, attention, processes, disk and Hub; each is tried, not only looked up.

    Exit code 0: fine-tuning works here. 1: something that it needs does not work.

    Example: lmtune doctor
    """
    count, found = {"ok": 0, "warn": 0, "fail": 0}, []
    err.print("[dim]trying what works on this machine[/]")
    for finding in examine(runs_dir):
        count[finding.level] += 1
        found.append({**asdict(finding), "fix": finding.fix or None})
        if as_json:
            continue
        out.print(f"[{COLORS[finding.level]}]{finding.level:<4}[/]  {finding.name:<15} {escape(finding.text)}")
        if finding.fix:
            out.print(f"      → {escape(finding.fix)}")
    if as_json:
        print_json({"works": not count["fail"], "findings": found})
    if count["fail"]:
        err.print(f"{count['fail']} of {sum(count.values())} fail; fix these first")
        raise typer.Exit(1)
    err.print("fine-tuning works here" + (f"; {pluralize(count['warn'], 'warning')}" if count["warn"] else ""))


if __name__ == "__main__":
    run(main)
