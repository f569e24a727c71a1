"""The training loop: one explicit function from the first step to the last.

    outcome = train(Job(run, config, forward, data, accelerator, …))

Each step: the plan says which rows; their gradients are summed over micro-batches and processes; if anything is not
finite the run stops before the update and names the rows; else clip, AdamW, record, and now and then score the
validation rows and save. What a step does depends only on the settings, the rows and the step's number, so a resumed
run repeats an uninterrupted one bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from lmtune.batching.plan import Plan, StepPlan, TokenCost
from lmtune.batching.prefetch import BatchPrefetcher
from lmtune.batching.prefixes import Ints, beginning
from lmtune.config.schema import FinetuneConfig
from lmtune.errors import LmtuneError
from lmtune.forward.packed import PackedForward
from lmtune.io.console import warn
from lmtune.io.text import format_list
from lmtune.kernels.lora_linear import drop_dense
from lmtune.models.device import return_freed_memory
from lmtune.models.tuning.lora import trainable
from lmtune.parallel.signals import Interrupted, StopSignals
from lmtune.runs.log import Accuracies, Records, StepRecord
from lmtune.runs.store import RunDirectory
from lmtune.training.checkpoint import (
    Checkpoint,
    Tensors,
    load_checkpoint,
    optimizer_tensors,
    problem_of,
    prune_checkpoints,
    restore,
    save_checkpoint,
)
from lmtune.training.memory import checkpoint_layers, is_checkpointed_throughout
from lmtune.training.optim import learning_rate
from lmtune.training.progress import StepProgress
from lmtune.training.step import StepSums, find_nonfinite_examples, step_gradients

_FREE_EVERY = 16  # steps; what is freed must be faulted in again, a fraction of a second each time


@dataclass
class Job:
    """Everything `train` works with.

    Attributes:
        run: where files go.
        config: the run's settings.
        forward: the model with its adapter.
        data: the training rows: `sequences` and `[i]`.
        accelerator: the processes.
        micro_batch_tokens: the budget to begin with.
        identity: what must be equal for a checkpoint to be continued.
        validate: scores the validation rows, or None if there are none.
        resumed: the checkpoint to go on from.
        cost: of tokens beside each other, by which sequences are dealt to processes.
    """

    run: RunDirectory
    config: FinetuneConfig
    forward: PackedForward
    data: Any
    accelerator: Any
    micro_batch_tokens: int
    identity: dict[str, Any] = field(default_factory=dict)
    validate: Callable[[], Accuracies] | None = None
    resumed: Checkpoint | None = None
    cost: TokenCost = field(default_factory=TokenCost)


@dataclass
class Counters:
    """What changes from step to step besides the tensors; part of each checkpoint."""

    step: int = 0
    elapsed_tokens: int = 0
    elapsed_examples: int = 0
    seconds: float = 0.0
    micro_batch_tokens: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    evaluations_without_gain: int = 0


@dataclass(frozen=True)
class Outcome:
    """How training ended.

    Attributes:
        counters: as of the last step.
        weights: the adapter to keep: of the best step if validation decided that, else of the last; None is the
            model's own.
        stopped_early: whether patience ended the run.
    """

    counters: Counters
    weights: Tensors | None
    stopped_early: bool


def train(job: Job) -> Outcome:
    """Run all steps that are left; the model then holds the adapter to keep.

    Raises:
        LmtuneError: loss or gradient was not finite, or memory does not suffice for a single sequence.
        Interrupted: the run was asked to stop; a checkpoint holds the last step.
    """
    config, main = job.config, job.accelerator.is_main_process
    parameters = trainable(job.forward.model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.0, weight_decay=config.train.weight_decay, fused=True)
    counters = _begin(job, optimizer, parameters)
    prefetcher = _feeder(job, counters.micro_batch_tokens)
    total_steps = prefetcher.plan.total_steps
    records = Records(job.run, enabled=main)
    records.begin(counters.step)
    progress = StepProgress(total_steps, counters.step + 1, enabled=main)
    stopped_early = _out_of_patience(counters, config)  # a crash after the last step leaves nothing to do
    job.forward.model.train()
    saved_at = time.monotonic()
    with StopSignals() as signals, progress, prefetcher:
        prefetcher.start(counters.step + 1)
        while counters.step < total_steps and not stopped_early:
            started = time.perf_counter()
            todo = prefetcher.next_step()
            job.accelerator.place = f"step {todo.step}"
            todo, sums = _gradients(job, prefetcher, todo, parameters, signals)
            if not sums.is_finite:
                _save(job, optimizer, parameters, counters)
                raise _not_finite(job, todo, sums, parameters)
            _update(optimizer, parameters, learning_rate(todo.step, total_steps, config.train), sums, config)
            seconds = time.perf_counter() - started
            _count(counters, todo, seconds, prefetcher.plan)
            progress.advance(todo.step, sums.loss, todo.num_tokens, seconds)
            validation = _validate(job, counters, total_steps, progress)
            records.add(*_record(todo, sums, counters, total_steps, config, seconds), validation)
            if todo.step % _FREE_EVERY == 0:
                return_freed_memory()
            stopped_early = _out_of_patience(counters, config)
            last = stopped_early or counters.step == total_steps
            stop = sums.interrupted or (job.accelerator.num_processes == 1 and signals.asked())
            if last or stop or _is_due(counters, validation, config, time.monotonic() - saved_at):
                _save(job, optimizer, parameters, counters)
                saved_at = time.monotonic()
            if stop and not last:
                raise Interrupted(
                    f"stopped after step {counters.step} of {total_steps}, which is saved; the same command goes "
                    "on from there", signals.exit_code,
                )  # fmt: skip
    return Outcome(counters, _keep_best(job, counters, parameters), stopped_early)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step on one process, so that dropout depends on nothing that came before."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def _begin(job: Job, optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter]) -> Counters:
    """Counters at zero, or where the checkpoint left them, with its tensors restored.

    The micro-batch budget goes on as it was, perhaps halved, unless another one is asked for now.
    """
    if job.resumed is None:
        return Counters(micro_batch_tokens=job.micro_batch_tokens)
    restore(job.resumed, optimizer, parameters)
    counters = Counters(**job.resumed.state["counters"])
    if job.resumed.state.get("micro_batch_setting") != job.config.train.micro_batch_tokens:
        counters.micro_batch_tokens = job.micro_batch_tokens
    return counters


def _feeder(job: Job, micro_batch_tokens: int) -> BatchPrefetcher:
    """What feeds this process; not started."""
    on_gpu = next(job.forward.base.parameters()).device.type == "cuda"
    shares = job.forward.shares_prefixes
    plan = _plan(job, micro_batch_tokens)
    return BatchPrefetcher(plan, job.accelerator.process_index, job.data.__getitem__, shares, pin=on_gpu)


def _plan(job: Job, micro_batch_tokens: int) -> Plan:
    data, world = job.data, job.accelerator.num_processes

    def beginnings_of(row: int) -> list[Ints]:
        return [beginning(document.input_ids, document.loss_mask) for document in data[row].sequences]

    return Plan(
        data.sequences, job.config.train, world, micro_batch_tokens,
        beginnings_of if job.forward.shares_prefixes else None, job.cost,
    )  # fmt: skip


def _gradients(
    job: Job,
    prefetcher: BatchPrefetcher,
    todo: StepPlan,
    parameters: dict[str, torch.nn.Parameter],
    signals: StopSignals,
) -> tuple[StepPlan, StepSums]:
    """The step's gradient; out of memory halves the micro-batches and does the same step again."""
    rank, seed = job.accelerator.process_index, job.config.train.seed
    while True:
        seed_step(seed, todo.step, rank)
        sums = step_gradients(
            job.forward, parameters, prefetcher.batches(), todo.num_targets, len(todo.rows), job.accelerator,
            signals.asked,
        )  # fmt: skip
        if not sums.out_of_memory:
            return todo, sums
        prefetcher.start(todo.step, _smaller(job, prefetcher.plan, todo))
        todo = prefetcher.next_step()


def _smaller(job: Job, plan: Plan, todo: StepPlan) -> Plan:
    """A plan that needs less memory: without dense copies of quantised weights, then with half the micro-batch, and
    when sequences stand alone already, with layers computed twice.

    The step's examples, and so its update, stay the same.
    """
    longest, main = todo.longest, job.accelerator.is_main_process
    dropped = drop_dense(job.forward.model)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if dropped:
        if main:
            warn(f"out of memory at step {todo.step}: no dense copies of quantised weights from here on (same result)")
        return plan
    if plan.micro_batch_tokens > longest:
        budget = max(longest, plan.micro_batch_tokens // 2)
        if main:
            warn(f"out of memory at step {todo.step}: micro-batches of {budget} tokens from here on (same result)")
        return _plan(job, budget)
    setting = job.config.train.gradient_checkpointing
    if setting == "auto" and not is_checkpointed_throughout(job.forward.base):
        if main:
            warn(f"out of memory at step {todo.step}: layers are computed twice from here on (same result, slower)")
        checkpoint_layers(job.forward.base, job.forward.base.config.get_text_config().num_hidden_layers)
        return plan
    raise LmtuneError(
        f"out of memory at step {todo.step} with a single sequence of {longest} tokens; lower data.max_length, use "
        "model.quantization=nf4, a smaller model, or train.gradient_checkpointing=true"
    )


def _not_finite(job: Job, todo: StepPlan, sums: StepSums, parameters: dict[str, torch.nn.Parameter]) -> LmtuneError:
    """An error that names the rows that made the loss or gradient infinite or NaN, on whichever process they were."""
    rank = job.accelerator.process_index
    seed_step(job.config.train.seed, todo.step, rank)
    offenders = find_nonfinite_examples(job.forward, parameters, todo.shares[rank], job.data.__getitem__)
    if job.accelerator.num_processes > 1:
        offenders = job.accelerator.gather_object(offenders)
    rows = format_list(sorted(set(offenders))) if offenders else "  no single row alone; the step as a whole"
    return LmtuneError(
        f"step {todo.step}: the loss ({sums.loss}) or the gradient (norm {sums.grad_norm}) is not finite. The adapter "
        f"was not changed by this step. Rows at fault:\n{rows}\n"
        "  look at these rows with `lmtune preview`; if they are fine, lower train.learning_rate"
    )


def _update(
    optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter], rate: float, sums: StepSums,
    config: FinetuneConfig,
) -> None:  # fmt: skip
    """Clip by the norm that is already known, and step AdamW at `rate`."""
    if (limit := config.train.max_grad_norm) is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), limit, torch.tensor(sums.grad_norm))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def _count(counters: Counters, todo: StepPlan, seconds: float, plan: Plan) -> None:
    counters.step = todo.step
    counters.elapsed_tokens += todo.num_tokens
    counters.elapsed_examples += len(todo.rows)
    counters.seconds += seconds
    counters.micro_batch_tokens = plan.micro_batch_tokens


def _record(
    todo: StepPlan, sums: StepSums, counters: Counters, total_steps: int, config: FinetuneConfig, seconds: float
) -> tuple[StepRecord, tuple[int, int], Accuracies]:
    rate = learning_rate(todo.step, total_steps, config.train)
    record = StepRecord(
        todo.step, round(todo.epoch, 6), sums.loss, rate, sums.grad_norm, todo.num_tokens, todo.num_targets,
        len(todo.rows), round(seconds, 6),
    )  # fmt: skip
    accuracies = Accuracies(
        sums.loss, sums.correct_sequences / len(todo.rows), sums.correct_tokens / max(1, todo.num_targets)
    )
    return record, (counters.elapsed_tokens, counters.elapsed_examples), accuracies


def _validate(job: Job, counters: Counters, total_steps: int, progress: StepProgress) -> Accuracies | None:
    """Score the validation rows if this step is one where they are due, and note whether it is the best so far."""
    every, last = job.config.evaluation.every_steps, counters.step == total_steps
    if job.validate is None or not (last or (every is not None and counters.step % every == 0)):
        return None
    scores = job.validate()
    better = counters.best_loss is None or scores.loss < counters.best_loss
    if better:
        counters.best_step, counters.best_loss, counters.evaluations_without_gain = counters.step, scores.loss, 0
    else:
        counters.evaluations_without_gain += 1
    note = "best so far" if better else f"best was {counters.best_loss:.4f} at step {counters.best_step}"
    progress.say(f"step {counters.step}: validation loss {scores.loss:.4f} ({note})")
    return scores


def _is_due(counters: Counters, validation: Accuracies | None, config: FinetuneConfig, seconds: float) -> bool:
    """Whether a checkpoint is to be written, `seconds` after the last one. Only the first process writes, so that the
    others need not have the same clock."""
    minutes = config.run.checkpoint_every_minutes
    if minutes is not None and seconds >= 60 * minutes:
        return True
    is_best = validation is not None and counters.best_step == counters.step and config.evaluation.keep_best
    return is_best or counters.step % config.run.checkpoint_every_steps == 0


def _out_of_patience(counters: Counters, config: FinetuneConfig) -> bool:
    patience = config.evaluation.patience
    return patience is not None and counters.evaluations_without_gain >= patience


def _save(
    job: Job, optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter], counters: Counters
) -> None:
    """Write a checkpoint from the first process, then drop the oldest; before the first step there is none."""
    if not job.accelerator.is_main_process or counters.step == 0:
        return
    job.accelerator.place = f"saving step {counters.step}"  # while the others wait in the next one
    adapter = {name: parameter.detach().contiguous().cpu() for name, parameter in parameters.items()}
    state = {
        "step": counters.step, "counters": asdict(counters), "identity": job.identity,
        "total_steps": Plan.count_steps(len(job.data), job.config.train),
        "micro_batch_setting": job.config.train.micro_batch_tokens,
    }  # fmt: skip
    save_checkpoint(
        job.run.checkpoints, Checkpoint(counters.step, adapter, optimizer_tensors(optimizer, parameters), state)
    )
    keep_best = counters.best_step if job.config.evaluation.keep_best else None
    prune_checkpoints(job.run.checkpoints, job.config.run.keep_checkpoints, keep_best, counters.step)


def _keep_best(job: Job, counters: Counters, parameters: dict[str, torch.nn.Parameter]) -> Tensors | None:
    """Put the best step's adapter back into the model if validation found one before the last step."""
    if not job.config.evaluation.keep_best or counters.best_step in (None, counters.step):
        return None
    job.accelerator.wait_for_everyone()
    path = job.run.checkpoints / f"step-{counters.best_step:06d}"
    if problem := problem_of(path):
        if job.accelerator.is_main_process:
            warn(
                f"the checkpoint of the best step, {path.name}, is damaged: {problem}; the last step's adapter is kept"
            )
        counters.best_step = None
        return None
    best = load_checkpoint(path)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(best.adapter[name])
    return best.adapter
