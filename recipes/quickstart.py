"""The main job on the embedded model and data: offline, on a CPU, in about two minutes.

lmtune quickstart
"""

import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from lmtune.config.files import shipped_configs
from lmtune.config.load import load_config
from lmtune.config.schema import FinetuneConfig
from lmtune.data.checking import check_config, describe_check
from lmtune.demo import support_data, support_heldout
from lmtune.errors import LmtuneError
from lmtune.io.console import command, err, escape, out, program
from lmtune.run import run
from lmtune.runs.store import RunDirectory

SHOWN_ANSWERS = 5


def main(
    runs_dir: Annotated[Path, typer.Option("--dir", help="Where runs are kept.")] = Path("runs"),
    chat: Annotated[bool, typer.Option("--chat", help="Open the chat in the browser at the end.")] = False,
) -> None:
    """Teach the embedded model a shop's answers over a 4-bit base, score it before and after, merge and verify it.

    The model is a demonstration: it speaks the language of a small made-up world and knows nothing else.

    Example: lmtune quickstart --chat
    """
    began = time.monotonic()
    train, heldout = str(support_data()), str(support_heldout())
    paths = {"data.train": train, "data.validation": heldout, "run.dir": str(runs_dir)}
    config = load_config(FinetuneConfig, shipped_configs()["quickstart"], paths)
    run_directory = RunDirectory.of(config.run)
    checked = check_config(config)
    out.print(escape(describe_check(checked)))
    if run_directory.read_summary().status == "complete":
        err.print(f"replacing the earlier {escape(str(run_directory.path))}")
        shutil.rmtree(run_directory.path)

    from lmtune.export.merged import merge_run
    from lmtune.recipes.finetune import finetune

    summary = finetune(config, run_directory, SHOWN_ANSWERS)
    if summary.status != "complete":
        raise LmtuneError(f"{run_directory.path}: not complete; the same command resumes it")
    merge_run(run_directory, run_directory.merged, "trained")
    out.print(f"\nAll done in {time.monotonic() - began:.0f} s. Next:")
    say_next_steps(run_directory)
    if chat:
        from lmtune.recipes.app import main as open_app

        open_app([str(run_directory.path)])


def say_next_steps(run_directory: RunDirectory) -> None:
    """Commands that work as they are printed, in the folder and shell that this one ran in."""
    row = json.dumps({"prompt": "When are you open?", "completion": "From nine to five."})
    for line, purpose in (
        (command("chat", run_directory.path), "talk to it here"),
        (command("app", run_directory.path), "or in the browser, base and tuned"),
        (f"echo {shlex.quote(row)} >> my.jsonl", "then your own questions and answers, one a line"),
        (command("check", "my.jsonl"), "what is wrong with them, line by line"),
        (
            command("init", "--model", "Qwen/Qwen3-0.6B", "--data", "my.jsonl"),
            "a config for a real model that fits here",
        ),
    ):
        out.print(f"  [bold]{escape(line)}[/]\n      {purpose}")
    activate = os.path.relpath(Path(sys.executable).with_name("activate"))
    if program() != "lmtune" and os.path.isfile(activate):
        out.print(f"  [dim]For plain `lmtune` in this shell: . {escape(shlex.quote(activate))}[/]")


if __name__ == "__main__":
    run(main)
