"""Fine-tune a language model on a file of questions and answers.

lmtune finetune support train.epochs=2
lmtune finetune --model Qwen/Qwen3-0.6B --data my.jsonl
accelerate launch recipes/finetune.py recipes/configs/support.yaml
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from lmtune.config import options
from lmtune.config.load import command_config
from lmtune.config.schema import FinetuneConfig, LoraConfig, RewardConfig
from lmtune.data.checking import check_config
from lmtune.io.console import command, err, escape, out, progress
from lmtune.parallel.detach import start_detached
from lmtune.parallel.launch import launch
from lmtune.parallel.worker import check_world, is_worker
from lmtune.run import run
from lmtune.runs.store import RunDirectory, Summary


def main(
    config_file: options.ConfigFile = None,
    overrides: options.Overrides = None,
    model: options.BaseModel = None,
    data: options.TrainRows = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes to train in, one a GPU.")] = 1,
    detach: Annotated[bool, typer.Option("--detach", help="In the background; it survives a closed terminal.")] = False,
) -> None:
    """Fine-tune a model as CONFIG says, or with the defaults. The same command resumes where it stopped.

    Without CONFIG, --model and --data are enough; the run is then named after the data file.

    Example: lmtune finetune qwen3_0.6b data.train=my.jsonl

    Example: lmtune finetune --model Qwen/Qwen3-0.6B --data my.jsonl train.epochs=2 run.name=trial
    """
    config = command_config(config_file, overrides or [], model, data or [], "finetune")
    run_directory = RunDirectory.of(config.run)
    check_world()
    words = [*([config_file] if config_file else []), *(overrides or []), *(["--model", model] if model else [])]
    words += [word for path in data or [] for word in ("--data", path)]
    if detach:
        several = ["--processes", str(processes)] if processes > 1 else []
        sys.exit(start_detached("finetune", words + several, run_directory, anew=config.run.resume == "never"))
    check_config(config)  # before any model is loaded
    if processes > 1 and not is_worker():
        sys.exit(launch(Path(__file__), words, processes))
    finetune(config, run_directory)


def finetune(config: FinetuneConfig, run_directory: RunDirectory, shown_answers: int = 3) -> Summary:
    """Train, show scores and some answers; returns the summary. What is heavy is imported here, after the checks."""
    with progress("loading PyTorch and the libraries"):
        from lmtune.runs.log import read_predictions
        from lmtune.runs.tables import describe_scores, predictions_shown, print_classes, scores_table
        from lmtune.training.run import run_finetune

    result = run_finetune(config, run_directory)
    if result.is_main_process:
        shown = escape(str(run_directory.path))
        if result.was_complete:
            err.print(f"{shown} is complete already; give run.name=… for a new run, or run.resume=never")
        else:
            base, tuned = result.summary.base, result.summary.tuned
            if tuned is not None:
                out.print(scores_table(base, tuned, result.summary.tree.get("baseline")))
                lines = [escape(line) for line in describe_scores(base, tuned, result.summary.standard_errors)]
                out.print("\n".join([*lines, *predictions_shown(read_predictions(run_directory), shown_answers)]))
                print_classes(result.summary.tree.get("classes"))
                if run_directory.confusion.exists():
                    err.print(f"the confusion matrix as a picture: {escape(str(run_directory.confusion))}")
            if run_directory.report.exists():
                err.print(f"all of it on one page: {escape(str(run_directory.report))}")
            talk = f"talk to it: {command('chat', run_directory.path)}"
            if isinstance(config.objective, RewardConfig):
                talk = f"score answers with it: {command('predict', run_directory.path, 'FILE')}"
            what = "adapter" if isinstance(config.tuning, LoraConfig) else "model"
            err.print(f"the {what} is in {escape(str(run_directory.result(config.tuning)))}; {escape(talk)}")
    return result.summary


if __name__ == "__main__":
    run(main)
