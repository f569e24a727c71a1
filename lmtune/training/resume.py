"""Whether a run begins, resumes or is complete, and whether a resumed run would still be the same run.

A checkpoint carries its run's signature: the settings, data and base that decide the result. If any of them has
changed, continuing would give a model that no single command describes, so it is refused and the differences named.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from lmtune.batching.plan import Planner
from lmtune.config.json_schema import settings
from lmtune.config.load import load_config
from lmtune.config.schema import FinetuneConfig, RunConfig, TrainConfig
from lmtune.data.report import DataReport, changed_files
from lmtune.errors import CheckpointError
from lmtune.io.text import format_list
from lmtune.runs.events import read_events
from lmtune.runs.log import recorded_steps
from lmtune.runs.store import RunDirectory
from lmtune.training.checkpoint import Checkpoint, newest_checkpoint
from lmtune.training.state import RunSignature

_LENGTH = ("train.epochs", "train.max_steps")  # a run may be trained on: `steps_before` and `require_steps` judge them


def find_checkpoint(
    run: RunDirectory, now: RunSignature, data: DataReport | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to resume from (None at the beginning), and what was wrong with newer ones.

    CheckpointError if the run was made with another signature than `now`, or all its checkpoints are damaged; `data`
    tells which file changed.
    """
    run.clean()
    checkpoint, skipped = newest_checkpoint(run.checkpoints)
    if checkpoint is not None:
        check_resumable(run, checkpoint.state.signature, now, data)
    return checkpoint, skipped


def records_lost(run: RunDirectory, checkpoint: Checkpoint | None) -> list[str]:
    """What to say of the steps that an unfinished run has done, where their weights or records are gone.

    CheckpointError if checkpoints must have been written and there are none, or the records are damaged.
    """
    steps, summary = recorded_steps(run), run.read_summary()
    read_events(run)
    if checkpoint is not None:
        missing = checkpoint.step - len({step for step in steps if 1 <= step <= checkpoint.step})
        return [f"{run.metrics}: {missing} of the {checkpoint.step} steps done are no longer recorded"] * bool(missing)
    done = max([*steps, summary.steps or 0])
    due = (load_config(FinetuneConfig, run.config).run if run.exists() else RunConfig()).checkpoint_every_steps
    # The first one itself may have been what could not be written.
    if done > due or (done and summary.status == "complete"):
        raise CheckpointError(
            f"{run.checkpoints}: no checkpoint is there, though {done} steps are recorded; restore the folder from a "
            "copy, or begin again with run.resume=never (the old run is renamed)"
        )
    return [f"{run.path}: no checkpoint yet; restarting from step 0 ({done} steps lost)"] * bool(done)


def check_resumable(run: RunDirectory, before: RunSignature, now: RunSignature, data: DataReport | None = None) -> None:
    """Raise CheckpointError with every difference between a run's signature and the one asked for.

    A setting that the run's version did not know yet counts as its default, which keeps what was done before.
    """
    known = settings(FinetuneConfig, now.settings)
    defaults = {key: setting.default for key, setting in known.items() if key in now.settings}
    old, new = ({k: v for k, v in one.items() if k not in _LENGTH} for one in (
        {**defaults, **before.settings}, now.settings))  # fmt: skip
    differences = [
        f"{key}: was {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if before.base != now.base:
        differences.append("the base model's weights: changed")
    if before.start != now.start:
        differences.append("the starting adapter's weights: changed")
    if before.selection != now.selection:
        differences.append(f"the selected rows ({run.selection.name}): changed")
    has_tokens = before.tokens is not None and now.tokens is not None
    if (before.tokens != now.tokens) if has_tokens else (before.data != now.data):
        differences += _changed_data(run, data, alone=not differences)
    if differences:
        raise CheckpointError(
            f"{run.path}: cannot resume: settings changed since this run started\n{format_list(differences)}\n"
            "  put these back, or choose a new run.name, or begin again with run.resume=never (the old run is renamed)"
        )


def steps_before(before: RunSignature | None, num_rows: int, train: TrainConfig) -> int | None:
    """How many steps a run of that signature was to have; None if it does not say so."""
    known = {} if before is None else before.settings
    length: dict[str, Any] = {key.partition(".")[2]: known.get(key) for key in _LENGTH}
    return None if length["epochs"] is None else Planner.count_steps(num_rows, replace(train, **length))


def require_steps(run: RunDirectory, done: int, steps: int, train: TrainConfig) -> None:
    """Raise CheckpointError if a run that has `done` so many is to have only `steps`."""
    if done > steps:
        key = "train.epochs" if train.max_steps is None else "train.max_steps"
        value = train.epochs if train.max_steps is None else train.max_steps
        enough = math.ceil(done * value / steps)
        raise CheckpointError(
            f"{run.path}: {key}: {value:g} makes {steps} steps, and {done} are done; raise it to {enough} or "
            "more (the run's config.yaml says what it was), or begin again with run.resume=never (the old run is "
            "renamed)"
        )


def _changed_data(run: RunDirectory, data: DataReport | None, alone: bool) -> list[str]:
    """Why the tokens are others than they were, as far as the run's `data.json` tells.

    `alone`: nothing else differs, such as `data.max_length`, from which other tokens follow.
    """
    before = run.read_data_report()
    if before is None or data is None:
        return ["the data files' content: changed"]
    if files := changed_files(before, data):
        return files
    return ["tokenization: changed (the tokenizer, its template, or another version of lmtune)"] * alone
