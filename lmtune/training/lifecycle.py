"""A run from its first file to its last: begun, gone on with, interrupted, complete.

`summary.json` always tells the truth: "running" while it runs, "interrupted" or "failed" when it did not end, with the
reason; "complete" only when the adapter is saved and scored.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lmtune.batching.plan import Plan
from lmtune.config.load import dump_config, load_config, to_tree
from lmtune.config.schema import FinetuneConfig
from lmtune.config.yaml import read_yaml
from lmtune.data.report import describe_report
from lmtune.errors import CheckpointError, LmtuneError
from lmtune.evaluation.generative import Answer
from lmtune.evaluation.scoring import Scores
from lmtune.io.atomic import name_disk_errors, write_json, write_text
from lmtune.io.console import err, escape, warn
from lmtune.io.text import pluralize, without_absolute_paths
from lmtune.models.locate import local_paths
from lmtune.parallel.signals import Interrupted, no_more_signals, sigterm_interrupts
from lmtune.runs.log import Records, read_answers
from lmtune.runs.store import RunDirectory
from lmtune.training.checkpoint import Checkpoint
from lmtune.training.compose import Session, environment, verification_rows
from lmtune.training.loop import Outcome
from lmtune.training.memory import peak_memory_gib
from lmtune.training.resume import (
    find_checkpoint,
    identity,
    records_lost,
    require_same,
    require_steps,
    steps_before,
)

FORMAT = 1


@contextlib.contextmanager
def running(run: RunDirectory, session: Session) -> Iterator[None]:
    """Hold the run's lock, and note in its summary how the block ended; sets an earlier run aside if that is asked.

    Raises:
        CheckpointError: another process holds it.
    """
    if not session.accelerator.is_main_process:
        yield
        return
    with contextlib.ExitStack() as held:
        held.enter_context(run.locked())
        if session.config.run.resume == "never" and run.exists():
            err.print(f"the earlier run is now {escape(str(run.set_aside()))}")
            held.enter_context(run.locked())  # the lock went with the earlier one
        held.enter_context(sigterm_interrupts())
        session.accelerator.on_failure = lambda reason: _note_end(run, session, "failed", reason)
        try:
            with name_disk_errors(run.path):
                yield
        except BaseException as error:
            stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
            with no_more_signals():
                _note_end(run, session, "interrupted" if stopped else "failed", str(error) or type(error).__name__)
            raise


def begin(run: RunDirectory, session: Session) -> tuple[Checkpoint | None, bool]:
    """Make the run's folder, or find where it stopped.

    Returns:
        The checkpoint to go on from (None at the beginning), and whether the run is complete already.

    Raises:
        CheckpointError: the run was begun with other settings, or its checkpoints or records are damaged or gone.
    """
    session.accelerator.wait_for_everyone()  # an earlier run was set aside
    checkpoint, skipped = find_checkpoint(run, session.identity, session.data.report)
    checkpoint, complete, longer = _with_its_length(run, session, checkpoint)
    lost = [] if complete else records_lost(run, checkpoint)
    base = None if complete else _known_scores(run, session)
    session.accelerator.wait_for_everyone()  # all have looked before the first one writes
    if session.accelerator.is_main_process:
        for problem in (*(f"skipped a damaged checkpoint: {problem}" for problem in skipped), *lost):
            warn(problem)
        if not complete:
            _say_start(run, session, checkpoint)
            if longer:
                err.print(longer)
            errors = {} if base is None else {"standard_errors": run.read_summary().get("standard_errors")}
            write_json(run.summary, {"format": FORMAT, "name": run.name, "status": "running", "base": base, **errors})
            session.begun = True
            # before the new settings: records are judged by those that they were made with
            Records(run, enabled=True).begin(0 if checkpoint is None else checkpoint.step)
            write_text(run.config, dump_config(session.config))
            write_json(run.environment, environment(session))
            write_json(run.local, local_paths(run, session.config.model.name))
            write_json(run.data, session.data.report.to_dict())
            write_json(run.verification, verification_rows(session))
    return checkpoint, complete


def _with_its_length(
    run: RunDirectory, session: Session, checkpoint: Checkpoint | None
) -> tuple[Checkpoint | None, bool, str]:
    """Whether the run is complete with the number of steps that is asked for now; a higher one trains it on.

    Returns:
        The checkpoint to go on from, whether nothing is left to do, and what to say of another number of steps.

    Raises:
        CheckpointError: more steps are done than are asked for, or the steps done are not there to go on from.
    """
    complete, train = _is_complete(run), session.config.train
    before = checkpoint.state["identity"] if checkpoint else _identity_of(run) if complete else {}
    if complete and checkpoint is None:  # they were deleted to save room
        require_same(run, before, session.identity, session.data.report)
    done = checkpoint.step if checkpoint else int(run.read_summary().get("steps") or 0) if complete else 0
    steps = Plan.count_steps(len(session.data.train), train)
    planned = steps_before(before, len(session.data.train), train)
    require_steps(run, done, steps, train)
    if planned is None or steps == planned or (complete and steps < planned):
        return checkpoint, complete, ""
    if checkpoint is None:
        raise CheckpointError(
            f"{run.checkpoints}: no checkpoint is there, and {steps} steps instead of {planned} go on from the last "
            f"one; restore it from a copy, ask for {planned} steps, or begin again with run.resume=never (the old run "
            "is renamed)"
        )
    counters = {**checkpoint.state["counters"], "evaluations_without_gain": 0}  # patience begins anew
    checkpoint = replace(checkpoint, state={**checkpoint.state, "counters": counters})
    said = (
        f"{planned} steps become {steps}: from step {done + 1} on the learning rate is that of "
        f"train.schedule={train.schedule} over {steps} steps"
    )
    return checkpoint, False, said


def _is_complete(run: RunDirectory) -> bool:
    """Whether the run ended well and its adapter is still there."""
    adapter = run.adapter / "adapter_model.safetensors"
    return run.read_summary().get("status") == "complete" and adapter.is_file()


def _identity_of(run: RunDirectory) -> dict[str, Any]:
    """What a run without checkpoints was begun with."""
    made = run.read_json(run.environment)
    config = load_config(FinetuneConfig, run.config)
    return identity(
        config, str(made.get("data_sha256")), str(made.get("base_fingerprint")), made.get("tokens_sha256"),
        made.get("starting_adapter_sha256"),
    )  # fmt: skip


def _known_scores(run: RunDirectory, session: Session) -> dict[str, Any] | None:
    """The base's scores from before, if they were measured as they would be now and its answers are still there."""
    known: dict[str, Any] | None = run.read_summary().get("base")
    if known is None or not _measures_the_same(run, session.config):
        return None
    return known if len(read_answers(run)) == known.get("exact_match_rows") else None


def _measures_the_same(run: RunDirectory, config: FinetuneConfig) -> bool:
    """Whether the base's scores, if there are any, were measured as `config` says."""
    before = read_yaml(run.config).get("evaluation") if run.exists() else None
    now = to_tree(config)["evaluation"]
    return isinstance(before, dict) and all(
        before.get(key) == now[key] for key in ("exact_match_rows", "max_new_tokens")
    )


def base_scores(run: RunDirectory, session: Session) -> dict[str, Any] | None:
    """What the model scores before training, unless the settings leave that out; from the summary when a resumed run
    has measured it already.

    The adapter must be as `prepare` made it; one to begin from is left aside.
    """
    known: dict[str, Any] | None = run.read_summary().get("base")
    session.accelerator.place = "scoring before training"
    session.accelerator.wait_for_everyone()
    wanted = known is None and session.config.evaluation.score_base
    errors = run.read_summary().get("standard_errors")
    with session.base_alone():
        scored = session.score("the base") if wanted else None
    if scored is not None:
        known, errors = scored[0].as_dict(), {"base": scored[0].standard_errors}
        if session.accelerator.is_main_process:
            rows = [{"question": a.question, "wanted": a.wanted, "base": a.given} for a in scored[1]]
            _write_answers(run, rows)
    if session.accelerator.is_main_process:
        _update(run, base=known, **({"standard_errors": errors} if errors else {}))
    return known


def add_tuned_answers(run: RunDirectory, given: Sequence[Answer]) -> None:
    """Put the tuned model's answers beside the base's in `answers.jsonl`, or alone where the base was not asked."""
    rows = read_answers(run) or [{"question": answer.question, "wanted": answer.wanted} for answer in given]
    _write_answers(run, [{**row, "tuned": answer.given} for row, answer in zip(rows, given, strict=True)])


def _write_answers(run: RunDirectory, rows: Sequence[Mapping[str, Any]]) -> None:
    write_text(run.answers, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def summarise(
    session: Session, outcome: Outcome, base: Mapping[str, Any] | None, tuned: Scores | None
) -> dict[str, Any]:
    """The finished run's `summary.json`."""
    counters = outcome.counters
    return {
        "format": FORMAT,
        "name": session.config.run.name,
        "status": "complete",
        "base": base,
        "tuned": None if tuned is None else tuned.as_dict(),
        "steps": counters.step,
        "best_step": counters.best_step if session.config.evaluation.keep_best else None,
        "stopped_early": outcome.stopped_early,
        "examples": counters.elapsed_examples,
        "tokens": counters.elapsed_tokens,
        "train_seconds": round(counters.seconds, 3),
        "tokens_per_second": round(counters.elapsed_tokens / max(counters.seconds, 1e-9), 1),
        "peak_memory_gib": round(peak_memory_gib(session.accelerator.device), 3),
        "micro_batch_tokens": counters.micro_batch_tokens,
        "trainable_parameters": sum(p.numel() for p in session.forward.model.parameters() if p.requires_grad),
        "processes": session.accelerator.num_processes,
        **({"started_from": session.start.name} if session.start is not None else {}),
    }


def _say_start(run: RunDirectory, session: Session, checkpoint: Checkpoint | None) -> None:
    config, data = session.config, session.data
    steps = Plan.count_steps(len(data.train), config.train)
    where = "begins" if checkpoint is None else f"goes on after step {checkpoint.step}"
    model = to_tree(config.model)["name"]
    held = "unquantised" if config.model.quantization == "none" else f"in {config.model.quantization}"
    err.print(f"{escape(str(run.path))} {where}: {escape(model)} {held}, {pluralize(steps, 'step')}")
    if session.start is not None:
        err.print(escape(f"from the adapter {session.start.name}, with its rank, alpha and layers"))
    err.print(escape(describe_report(data.report)))
    err.print(escape(session.renderer.description))
    err.print(f"parameters: {escape(session.parameters.describe())}")
    for warning in evaluation_warnings(config, data.validation is not None, steps):
        warn(warning)


def evaluation_warnings(config: FinetuneConfig, has_validation: bool, steps: int) -> list[str]:
    """Which settings of `evaluation` have no effect in a run of so many steps."""
    every, patience = config.evaluation.every_steps, config.evaluation.patience
    if every is None:
        return []
    if not has_validation:
        return [f"evaluation.every_steps: {every} has no effect, for no row is held out (data.validation_fraction)"]
    if every > steps:
        also = "" if patience is None else f", and evaluation.patience: {patience} cannot end it earlier"
        return [f"evaluation.every_steps: {every} is beyond the last step, {steps}: scored at the end only{also}"]
    return []


def _note_end(run: RunDirectory, session: Session, status: str, reason: str) -> None:
    """Say in the summary how the run ended, if it is this session's."""
    if session.begun:
        _update(run, status=status, reason=without_absolute_paths(reason.splitlines()[0]))


def _update(run: RunDirectory, **values: Any) -> None:
    """Change some keys of the summary."""
    with contextlib.suppress(LmtuneError, OSError):  # never hide the error that is being reported
        write_json(run.summary, {**run.read_json(run.summary), **values})
