"""One fine-tuning run from its settings to its saved adapter: the story that every way to start one tells.

    result = run_finetune(config, RunDirectory.of(config.run))
    result.summary["tuned"]

Who starts it (the command, a notebook) has checked the settings and the data, and shows the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmtune.config.load import to_tree
from lmtune.config.schema import FinetuneConfig
from lmtune.io.atomic import write_json, write_text
from lmtune.parallel.launch import start_accelerator
from lmtune.runs.cards import adapter_card
from lmtune.runs.store import RunDirectory
from lmtune.training.compose import prepare, save_tuned
from lmtune.training.lifecycle import add_tuned_answers, base_scores, begin, running, summarise
from lmtune.training.loop import train


@dataclass(frozen=True)
class FinetuneResult:
    """How a run ended.

    Attributes:
        summary: what `summary.json` holds.
        was_complete: nothing was left to do; the summary is that of the earlier run.
        is_main_process: whether this process is the one that tells a person.
    """

    summary: dict[str, Any]
    was_complete: bool
    is_main_process: bool


def run_finetune(config: FinetuneConfig, run_directory: RunDirectory) -> FinetuneResult:
    """Train, score and save.

    Raises:
        ConfigError, DataError, ModelError, CheckpointError: something is wrong with what was given.
        Interrupted: the run was asked to stop; a checkpoint holds the last step.
        LmtuneError: the run failed.
    """
    accelerator = start_accelerator(config.run.process_timeout_seconds)
    session = prepare(config, accelerator)
    main = bool(accelerator.is_main_process)
    with running(run_directory, session):
        checkpoint, complete = begin(run_directory, session)
        if complete:
            return FinetuneResult(run_directory.read_summary(), True, main)
        base = base_scores(run_directory, session)
        outcome = train(session.job(run_directory, checkpoint))
        accelerator.place = "scoring and saving the result"
        tuned = session.score_tuned(outcome)
        summary = summarise(session, outcome, base, tuned[0] if tuned else None)
        if tuned:
            known = run_directory.read_summary().get("standard_errors") or {}
            summary["standard_errors"] = {**known, "tuned": tuned[0].standard_errors}
        if main:
            save_tuned(session, run_directory.adapter, outcome.weights)
            card = adapter_card(
                to_tree(session.config), summary, session.data.report.to_dict(), stops=session.renderer.stop_tokens
            )
            write_text(run_directory.adapter / "README.md", card)
            if tuned is not None:
                add_tuned_answers(run_directory, tuned[1])
            write_json(run_directory.summary, summary)  # last: it says that the run is complete
        accelerator.wait_for_everyone()  # nobody ends well before the result is saved
    return FinetuneResult(summary, False, main)
