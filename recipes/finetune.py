"""Fine-tune a language model on a file of questions and answers.

lmtune finetune recipes/configs/support.yaml train.epochs=2
accelerate launch recipes/finetune.py recipes/configs/support.yaml
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lmtune.cli import run
from lmtune.config import FinetuneConfig, data_paths, load_config, to_tree
from lmtune.console import err, escape, out
from lmtune.data.checking import check_data
from lmtune.runs import RunDirectory
from lmtune.training.workers import check_world, is_worker, launch
from lmtune.writing import write_json, write_text


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
    """Train, score and save; returns the run's summary. Everything heavy is imported here, after the checks."""
    from lmtune.report import adapter_card, scores_table
    from lmtune.training.lifecycle import add_tuned_answers, base_scores, begin, running, summarise
    from lmtune.training.loop import train
    from lmtune.training.session import prepare, save_tuned
    from lmtune.training.workers import start_accelerator

    accelerator = start_accelerator(config.run.process_timeout_seconds)
    session = prepare(config, accelerator)
    with running(run_directory, session):
        checkpoint, complete = begin(run_directory, session)
        if complete:
            shown = escape(str(run_directory.path))
            err.print(f"{shown} is complete already; give run.name=… for a new run, or run.resume=never")
            return run_directory.read_summary()
        base = base_scores(run_directory, session)
        outcome = train(session.job(run_directory, checkpoint))
        accelerator.place = "scoring and saving the result"
        tuned = session.score()
        summary = summarise(session, outcome, base, tuned[0] if tuned else None)
        if accelerator.is_main_process:
            save_tuned(session, run_directory.adapter, outcome.weights)
            card = adapter_card(to_tree(config), summary, session.data.fates)
            write_text(run_directory.adapter / "README.md", card)
            if tuned is not None:
                add_tuned_answers(run_directory, tuned[1])
            write_json(run_directory.summary, summary)  # last: it says that the run is complete
        accelerator.wait_for_everyone()  # nobody ends well before the result is saved
    if accelerator.is_main_process:  # out here, as nobody may read it any more
        if tuned is not None:
            out.print(scores_table(base, summary["tuned"]))
        adapter, run_path = escape(str(run_directory.adapter)), escape(str(run_directory.path))
        err.print(f"the adapter is in {adapter}; talk to it: lmtune chat {run_path}")
    return summary


if __name__ == "__main__":
    run(main)
