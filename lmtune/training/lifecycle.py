"""A run's files from its beginning to its end: begun, continued, interrupted, failed.

`summary.json` always tells the truth: "running" while it runs, "interrupted" or "failed" when it did not end, with the
reason; "complete" only when the adapter is saved and scored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lmtune.batching.plan import Planner
from lmtune.config.load import dump_config, load_config, to_tree
from lmtune.config.schema import FinetuneConfig, FullConfig, TrainConfig
from lmtune.config.yaml import read_yaml
from lmtune.data.report import describe_report
from lmtune.errors import CheckpointError, LmtuneError
from lmtune.evaluation.answer_metrics import token_f1
from lmtune.io.atomic import name_disk_errors, write_json, write_text
from lmtune.io.console import command, err, escape, warn
from lmtune.io.text import one_line, pluralize, without_absolute_paths
from lmtune.models.base import describe_dtype
from lmtune.models.locate import local_paths
from lmtune.parallel.signals import Interrupted, no_more_signals, sigterm_interrupts
from lmtune.runs.events import EventLog
from lmtune.runs.log import Records, read_predictions
from lmtune.runs.report import write_report
from lmtune.runs.store import RunDirectory, ScoreValues, Status
from lmtune.training.checkpoint import Checkpoint
from lmtune.training.compose import Components
from lmtune.training.environment import environment, preview, verification_rows
from lmtune.training.resume import check_resumable, find_checkpoint, records_lost, require_steps, steps_before
from lmtune.training.state import RunSignature

FORMAT = 1


@contextlib.contextmanager
def running(run: RunDirectory, parts: Components, events: EventLog) -> Iterator[None]:
    """Hold the run's lock, and note in summary and events how the block ended; renames an earlier run if that is asked.

    CheckpointError if another process holds it.
    """
    if not parts.parallel.is_main:
        yield
        return
    with contextlib.ExitStack() as held:
        held.enter_context(run.locked())
        if parts.config.run.resume == "never" and run.exists():
            err.print(f"the earlier run is now {escape(str(run.archive()))}")
            held.enter_context(run.locked())  # the lock went with the earlier one
        held.enter_context(sigterm_interrupts())
        parts.parallel.on_failure = lambda reason: _note_end(run, parts, events, "failed", reason)
        try:
            with name_disk_errors(run.path):
                yield
        except BaseException as error:
            stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
            with no_more_signals():
                reason = str(error) or type(error).__name__
                _note_end(run, parts, events, "interrupted" if stopped else "failed", reason)
            raise


def begin(run: RunDirectory, parts: Components, events: EventLog) -> tuple[Checkpoint | None, bool]:
    """Make the run's folder, or find where it stopped.

    Returns the checkpoint to resume from (None at the beginning), and whether the run is complete already. Raises
    CheckpointError if it was begun with other settings, or its checkpoints or records are damaged or gone.
    """
    parts.parallel.barrier()  # an earlier run was set aside
    checkpoint, skipped = find_checkpoint(run, parts.signature, parts.data.report)
    checkpoint, complete, longer = _with_its_length(run, parts, checkpoint)
    lost = [] if complete else records_lost(run, checkpoint)
    base = None if complete else _known_scores(run, parts)
    parts.parallel.barrier()  # all have looked before the first one writes
    if parts.parallel.is_main:
        for problem in (*(f"skipped a damaged checkpoint: {problem}" for problem in skipped), *lost):
            warn(problem)
        if not complete:
            _say_start(run, parts, checkpoint)
            if longer:
                err.print(longer)
            errors = {} if base is None else {"standard_errors": run.read_summary().standard_errors}
            write_json(run.summary, {"format": FORMAT, "name": run.name, "status": "running", "base": base, **errors})
            parts.begun = True
            # before the new settings: records are judged by those that they were made with
            done = 0 if checkpoint is None else checkpoint.step
            Records(run).begin(done)
            events.begin(done, knows_base=base is not None)
            if parts.selection is not None:
                write_json(run.selection, parts.selection.to_dict())
            write_text(run.config, dump_config(parts.config))
            write_json(run.environment, environment(parts))
            write_json(run.local, local_paths(run, parts.config.model.name))
            write_json(run.data, parts.data.report.to_dict())
            write_json(run.preview, preview(parts))
            write_json(run.verification, verification_rows(parts))
            events.status("running")
    return checkpoint, complete


def _with_its_length(
    run: RunDirectory, parts: Components, checkpoint: Checkpoint | None
) -> tuple[Checkpoint | None, bool, str]:
    """Whether the run is complete with the number of steps that is asked for now; a higher one trains it on.

    Returns the checkpoint to resume from, whether nothing is left to do, and what to say of another number of steps.
    Raises CheckpointError if more steps are done than are asked for, or the steps done are not there to go on from.
    """
    train = parts.config.train
    complete = run.has_result(parts.config.tuning) and run.read_summary().status == "complete"
    before = checkpoint.state.signature if checkpoint else _signature_of(run) if complete else None
    if complete and checkpoint is None and before is not None:  # they were deleted to save room
        check_resumable(run, before, parts.signature, parts.data.report)
    done = checkpoint.step if checkpoint else run.read_summary().steps or 0 if complete else 0
    steps = Planner.count_steps(parts.data.train.sequences.rows_per_epoch, train)
    planned = steps_before(before, parts.data.train.sequences.rows_per_epoch, train)
    require_steps(run, done, steps, train)
    if planned is None or steps == planned or (complete and steps < planned):
        return checkpoint, complete, ""
    if checkpoint is None:
        raise CheckpointError(
            f"{run.checkpoints}: no checkpoint; {steps} steps instead of {planned} must resume from the last one; "
            f"restore it from a copy, ask for {planned} steps, or begin again with run.resume=never (the old run "
            "is renamed)"
        )
    patient = replace(checkpoint.state.train, evaluations_without_gain=0)  # patience starts again
    checkpoint = replace(checkpoint, state=replace(checkpoint.state, train=patient))
    said = (
        f"{planned} steps become {steps}: from step {done + 1} on the learning rate is that of "
        f"train.schedule={train.schedule} over {steps} steps"
    )
    return checkpoint, False, said


def _signature_of(run: RunDirectory) -> RunSignature:
    """What a run without checkpoints was begun with."""
    made = run.read_json(run.environment)
    config = load_config(FinetuneConfig, run.config)
    return RunSignature.of(
        config, str(made.get("data_sha256")), str(made.get("base_fingerprint")),
        *(None if made.get(key) is None else str(made[key])
          for key in ("tokens_sha256", "starting_adapter_sha256", "selection_sha256")),
    )  # fmt: skip


def _known_scores(run: RunDirectory, parts: Components) -> ScoreValues | None:
    """The base's scores from before, if they were measured as they would be now and its predictions are still there."""
    known = run.read_summary().base
    if known is None:
        return None
    before, now = (read_yaml(run.config).get("evaluation") or {}, to_tree(parts.config)["evaluation"])
    same = all(before.get(key) == now[key] for key in ("exact_match_rows", "max_new_tokens"))
    return known if same and len(read_predictions(run)) == known.get("exact_match_rows") else None


def _say_start(run: RunDirectory, parts: Components, checkpoint: Checkpoint | None) -> None:
    config, data = parts.config, parts.data
    steps = Planner.count_steps(data.train.sequences.rows_per_epoch, config.train)
    where = "begins" if checkpoint is None else f"resumes after step {checkpoint.step}"
    model = to_tree(config.model)["name"]
    held = "unquantized" if config.model.quantization == "none" else f"in {config.model.quantization}"
    err.print(f"{escape(str(run.path))} {where}: {escape(model)} {held}, {pluralize(steps, 'step')}")
    if parts.start is not None:
        err.print(escape(f"from the adapter {parts.start.name}, with its rank, alpha and layers"))
    err.print(escape(describe_report(data.report)))
    err.print(escape(parts.renderer.description))
    dtype = describe_dtype(config.model, parts.parallel.device, parts.forward.dtype)
    err.print(f"precision: {escape(dtype)}")
    err.print(f"parameters: {escape(parts.parameters.describe())}")
    if isinstance(config.tuning, FullConfig) and config.train.learning_rate == TrainConfig().learning_rate:
        warn(
            f"train.learning_rate: {config.train.learning_rate} is the default, for adapters; with tuning.kind: full "
            "usual rates are 5e-6 to 5e-5 (a small model takes more)"
        )
    for warning in evaluation_warnings(config, data.validation is not None, steps):
        warn(warning)


def evaluation_warnings(config: FinetuneConfig, has_validation: bool, steps: int) -> list[str]:
    """Which settings of `evaluation` have no effect in a run of so many steps."""
    every = config.evaluation.every_steps
    if every is not None and not has_validation:
        return [f"evaluation.every_steps: {every} has no effect, for no row is held out (data.validation_fraction)"]
    if every is not None and every > steps:
        return [f"evaluation.every_steps: {every} is beyond the last step, {steps}: scored at the end only"]
    return []


def _note_end(run: RunDirectory, parts: Components, events: EventLog, status: Status, reason: str) -> None:
    """Say in summary and events how the run ended, if the run's files are this process's."""
    if parts.begun:
        said = without_absolute_paths(reason.splitlines()[0])
        update_summary(run, status=status, reason=said)
        with contextlib.suppress(OSError):  # never hide the error that is being reported
            events.status(status, said)
            draw_report(run)


def draw_report(run: RunDirectory) -> None:
    """Write `report.html` and `loss.png`; a run that cannot be drawn has not failed."""
    try:
        write_report([run], run.report, token_f1)
    except Exception as error:
        warn(f"no report: {one_line(error)}; {command('report', run.path)} tries again")


def update_summary(run: RunDirectory, **values: Any) -> None:
    """Change some keys of the summary."""
    with contextlib.suppress(LmtuneError, OSError):  # never hide the error that is being reported
        write_json(run.summary, {**run.read_json(run.summary), **values})
