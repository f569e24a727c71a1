"""Fine-tune a language model on a file of questions and answers.

lmtune finetune recipes/configs/support.yaml train.epochs=2
accelerate launch recipes/finetune.py recipes/configs/support.yaml
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lmtune.cli import run
from lmtune.config import FinetuneConfig, data_paths, load_config
from lmtune.console import err, escape, out
from lmtune.data.checking import check_data
from lmtune.runs import RunDirectory
from lmtune.training.workers import check_world, is_worker, launch


def main(
    config_file: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; see recipes/configs.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace those of the file.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes to train in, one a GPU.")] = 1,
) -> None:
    """Fine-tune a model as CONFIG says. The same command again goes on where it stopped.

    Example: lmtune finetune recipes/configs/support.yaml train.epochs=2 run.name=trial
    """
    config = load_config(FinetuneConfig, config_file, overrides or [])
    run_directory = RunDirectory.of(config.run)
    check_world()
    check_data(data_paths(config.data.train), data_paths(config.data.validation or ()))  # before any model is loaded
    if processes > 1 and not is_worker():
        sys.exit(launch(Path(__file__), [str(config_file), *(overrides or [])], processes))
    finetune(config, run_directory)


def finetune(config: FinetuneConfig, run_directory: RunDirectory) -> dict[str, Any]:
    """Train and show the scores; returns the run's summary. Everything heavy is imported here, after the checks."""
    from lmtune.report import scores_table
    from lmtune.training.run import run_finetune

    result = run_finetune(config, run_directory)
    if result.is_main_process:
        shown = escape(str(run_directory.path))
        if result.was_complete:
            err.print(f"{shown} is complete already; give run.name=… for a new run, or run.resume=never")
        else:
            if result.summary["tuned"] is not None:
                out.print(scores_table(result.summary["base"], result.summary["tuned"]))
            err.print(f"the adapter is in {escape(str(run_directory.adapter))}; talk to it: lmtune chat {shown}")
    return result.summary


if __name__ == "__main__":
    run(main)
