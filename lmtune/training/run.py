"""One run from its settings to its saved adapter: the story that every way to start one tells.

    result = run_finetune(config, RunDirectory.of(config.run))
    result.summary.tuned

Who starts it (the command, a notebook) has checked the settings and the data, and shows the result.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lmtune.config.schema import FinetuneConfig
from lmtune.data.selection import Selection
from lmtune.evaluation.generative import Answer
from lmtune.evaluation.scoring import Scores
from lmtune.inference.load import run_metadata
from lmtune.io.atomic import new_folder, write_json, write_text
from lmtune.io.console import err, warnings_heard_by
from lmtune.io.text import pluralize
from lmtune.models.device import free_memory
from lmtune.models.model_folder import write_adapter_texts
from lmtune.models.structure import is_streamed
from lmtune.models.tensor_shards import are_shared_out, checkpoint_weights
from lmtune.parallel.launch import connect
from lmtune.runs.cards import result_card
from lmtune.runs.events import Evaluated, EventLog
from lmtune.runs.log import Records, read_predictions
from lmtune.runs.pictures import confusion_svg
from lmtune.runs.store import RunDirectory, ScoreValues, Summary, checkpoint_folder
from lmtune.training import memory
from lmtune.training.checkpoint import Checkpoint
from lmtune.training.compose import Components, compose
from lmtune.training.find_rate import with_found_rate
from lmtune.training.hooks import CheckpointHook, EarlyStoppingHook, EvaluationHook, ProgressHook, RecordHook
from lmtune.training.lifecycle import FORMAT, begin, draw_report, running, update_summary
from lmtune.training.loop import StepHook, train
from lmtune.training.machines import require_common_ground
from lmtune.training.optim import MOMENT_BYTES
from lmtune.training.progress import StepProgress
from lmtune.training.shared import Shared
from lmtune.training.state import TrainResult
from lmtune.training.trackers import Trackers, require_trackers


@dataclass(frozen=True)
class FinetuneResult:
    """How a run ended."""

    summary: Summary
    was_complete: bool  # nothing was left to do; the summary is that of the earlier run
    is_main_process: bool  # the one that tells a person


def run_finetune(
    config: FinetuneConfig, run: RunDirectory, selection: Selection | None = None, hooks: Sequence[StepHook] = (),
    shared: Shared | None = None,
) -> FinetuneResult:  # fmt: skip
    """Train, score and save.

    Args:
        config: the settings.
        run: its folder, where the run is resumed that was begun there.
        selection: which of the rows to use; None for what `selection.json` in the folder says, or all.
        hooks: told of each step after its validation and records, before its checkpoint.
        shared: what the runs of this process have in common.

    Raises:
        LmtuneError: something is wrong.
        Interrupted: the run was asked to stop, and is saved.
    """
    require_trackers(config.run.trackers)
    parallel = connect(config.parallel, config.run.process_timeout_seconds)
    events = EventLog(run)
    with warnings_heard_by(events.warn), contextlib.ExitStack() as held:
        parts = compose(config, parallel, run.read_selection() if selection is None else selection, shared)
        require_common_ground(run, parts)
        held.enter_context(running(run, parts, events))
        parts.config = with_found_rate(run, parts)
        checkpoint, complete = begin(run, parts, events)
        if complete:
            return FinetuneResult(run.read_summary(), True, parallel.is_main)
        parts.precompute()
        base = base_scores(run, parts, events)
        names = config.run.trackers if parallel.is_main else ()
        trackers = held.enter_context(Trackers(parts.config, run, names, 0 if checkpoint is None else checkpoint.step))
        if checkpoint is None:
            trackers.scored("base", base, 0)
        result = run_loop(run, parts, checkpoint, events, [trackers, *hooks])
        early = ""
        if result.stopped_early:
            count, name = config.evaluation.patience, parts.deciding[0]
            early = f"stopped early: {pluralize(count or 0, 'evaluation')} in a row without a better {name}"
            if parallel.is_main:
                err.print(f"{early} than at step {result.state.best_step}")
        parallel.phase = "scoring and saving the result"
        tuned = parts.score_tuned(result)
        trackers.scored("tuned", tuned[0].as_dict() if tuned else None, result.state.step)
        summary = summarize(parts, result, base, tuned[0] if tuned else None)
        if parts.head is not None:
            summary["labels"] = list(parts.head.labels)
            if base is not None:
                summary["baseline"] = parts.head.constant
        if tuned and tuned[0].classes is not None:
            summary["classes"] = asdict(tuned[0].classes)
        if tuned:
            known = run.read_summary().standard_errors
            summary["standard_errors"] = {**known, "tuned": tuned[0].standard_errors}
        if parallel.is_main:
            save_tuned(run, parts, result)
            card = result_card(
                parts.config, Summary.parse(summary), parts.data.report, stops=parts.renderer.stop_tokens
            )
            write_text(run.result(parts.config.tuning) / "README.md", card)
            if tuned is not None:
                add_tuned_predictions(run, tuned[1])
                events.add(Evaluated(result.state.step, "tuned", tuned[0].as_dict()))
            if "classes" in summary and (picture := confusion_svg(summary["classes"])) is not None:
                write_text(run.confusion, picture)
            write_json(run.summary, summary)  # last: it says that the run is complete
            events.status("complete", early)
            draw_report(run)
        parallel.barrier()  # nobody ends well before the result is saved
    return FinetuneResult(Summary.parse(summary), False, parallel.is_main)


def run_loop(
    run: RunDirectory, parts: Components, resumed: Checkpoint | None, events: EventLog, further: Sequence[StepHook] = ()
) -> TrainResult:
    """Make the steps that are left, with the hooks that the settings ask for; the model then holds what to keep."""
    config, is_main = parts.config, parts.parallel.is_main
    job, state = parts.job(resumed)
    total_steps = job.planner.total_steps
    progress = StepProgress(total_steps, state.step + 1, enabled=is_main)
    saving = CheckpointHook(run, config, parts.signature, job, total_steps, events)
    hooks: list[StepHook] = [ProgressHook(progress)]
    if parts.data.validation is not None:
        hooks.append(EvaluationHook(parts.validate, *parts.deciding, config.evaluation.every_steps, progress))
    if is_main:
        records = Records(run)
        records.begin(state.step)
        hooks.append(RecordHook(records, events, parts.deciding[0]))
    stopped_early = False
    if config.evaluation.patience is not None:
        stopping = EarlyStoppingHook(config.evaluation.patience)
        hooks.append(stopping)
        stopped_early = stopping.is_due(state)  # a crash after the last step leaves nothing to do
    hooks += [*further, saving]
    with progress:
        stopped_early = stopped_early or train(job, hooks, state)
    return TrainResult(state, saving.best_weights(state), stopped_early)


def save_tuned(run: RunDirectory, parts: Components, result: TrainResult) -> None:
    """Write what was trained: weights and config, tokenizer with template, generation config with the stop tokens.

    That is an adapter folder, or a whole model. It appears complete or not at all; one from before is replaced. What
    ranks hold together is read from the last step's checkpoint, tensor by tensor.
    """
    folder, weights = run.result(parts.config.tuning), result.weights
    if weights is None and are_shared_out(parts.model.trainable()):
        weights = checkpoint_weights(checkpoint_folder(run.checkpoints, result.state.step))
    with new_folder(folder) as staging:
        metadata = run_metadata(parts.config, parts.renderer, parts.fingerprint, folder, parts.head)
        parts.tuning.save(parts.model, staging, metadata, weights)
        write_adapter_texts(parts.config.model, parts.renderer, staging, writes=parts.head is None)


def base_scores(run: RunDirectory, parts: Components, events: EventLog) -> ScoreValues | None:
    """What the model scores before training, without an adapter to begin from; None if the settings leave that out.

    A resumed run that has measured it takes it from the summary.
    """
    known = run.read_summary().base
    parts.parallel.phase = "scoring before training"
    parts.parallel.barrier()
    wanted = known is None and parts.config.evaluation.score_base
    errors = run.read_summary().standard_errors
    # before the first step the model is the base; of a resumed run too, as its checkpoint is restored later
    with parts.model.without_adapter() if parts.start is not None else contextlib.nullcontext():
        scored = parts.score_base() if wanted else None
    if scored is not None:
        known, errors = scored[0].as_dict(), {"base": scored[0].standard_errors}
        if parts.parallel.is_main:
            rows = [{"question": a.question, "reference": a.reference, "base": a.prediction} for a in scored[1]]
            _write_predictions(run, rows)
            events.add(Evaluated(0, "base", known))
    if parts.parallel.is_main:
        update_summary(run, base=known, **({"standard_errors": errors} if errors else {}))
    return known


def add_tuned_predictions(run: RunDirectory, answers: Sequence[Answer]) -> None:
    """Put the tuned model's answers beside the base's in `predictions.jsonl`, or alone where the base was not asked."""
    rows = read_predictions(run) or [{"question": answer.question, "reference": answer.reference} for answer in answers]
    _write_predictions(run, [{**row, "tuned": answer.prediction} for row, answer in zip(rows, answers, strict=True)])


def _write_predictions(run: RunDirectory, rows: Sequence[Mapping[str, Any]]) -> None:
    write_text(run.predictions, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def estimated_memory(parts: Components, micro_batch_tokens: int) -> dict[str, float]:
    """What `lmtune plan` expects of one process's memory, by part, in GiB; Python and its libraries come on top."""
    config, rows = parts.config, parts.data.train.sequences
    shape = memory.shape_of(parts.model.module, parts.parameters)
    longest = memory.longest_unit(rows, config.objective.rows)
    share = float(rows.num_targets.sum() / rows.num_tokens.sum())
    per_step = int(rows.tokens_per_epoch / rows.rows_per_epoch * config.train.batch_size)
    quantization, dtype = config.model.quantization, parts.forward.dtype
    shards = parts.parallel.world_size if parts.parallel.equal_passes else 1
    is_streaming = is_streamed(parts.forward.base)
    free = 0 if is_streaming or shards > 1 else free_memory(parts.parallel.device)
    expected = memory.estimate(
        shape, min(max(micro_batch_tokens, longest), per_step), quantization, dtype, share,
        memory.checkpointed_layers(parts.forward.base),
        memory.dense_copies(shape, quantization, dtype, free),
        MOMENT_BYTES[config.train.optimizer], config.model.resident_layers if is_streaming else None, shards,
    )  # fmt: skip
    return {f"{name}_gib": round(size, 4) for name, size in {**asdict(expected), "memory": expected.total}.items()}


def summarize(
    parts: Components, result: TrainResult, base: Mapping[str, Any] | None, tuned: Scores | None
) -> dict[str, Any]:
    """The finished run's `summary.json`."""
    state = result.state
    estimate = estimated_memory(parts, state.micro_batch_tokens)
    return {
        "format": FORMAT,
        "name": parts.config.run.name,
        "status": "complete",
        "base": base,
        "tuned": None if tuned is None else tuned.as_dict(),
        "steps": state.step,
        "best_step": state.best_step if parts.config.evaluation.keep_best else None,
        "stopped_early": result.stopped_early,
        "examples": state.elapsed_examples,
        "tokens": state.elapsed_tokens,
        "train_seconds": round(state.seconds, 3),
        "tokens_per_second": round(state.elapsed_tokens / max(state.seconds, 1e-9), 1),
        "peak_memory_gib": round(memory.peak_memory_gib(parts.parallel.device), 3),
        "estimated_memory_gib": estimate["memory_gib"],
        "estimate": estimate,
        "micro_batch_tokens": state.micro_batch_tokens,
        "trainable_parameters": sum(p.numel() for p in parts.forward.model.parameters() if p.requires_grad),
        "processes": parts.parallel.world_size,
        **({"started_from": parts.start.name} if parts.start is not None else {}),
    }
