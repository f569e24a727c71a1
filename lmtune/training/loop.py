"""The training loop: one explicit function from the first step to the last, for every objective, tuning and rank.

    stopped_early = train(TrainingJob(planner, data, forward, objective, model, optimizer, …), hooks, state)

Each step: the plan says which examples; their gradients are summed over micro-batches and ranks; if anything is not
finite the run stops before the update and names the examples; else clip and AdamW. What is done between two steps
(scoring the validation rows, records, checkpoints, a progress bar) is the hooks'. What a step does depends only on the
settings, the rows and the step's number, so a resumed run repeats an uninterrupted one bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch

from lmtune.batching.plan import Planner, StepPlan
from lmtune.batching.prefetch import BatchPrefetcher
from lmtune.config.schema import TrainConfig
from lmtune.data.types import ExampleStore
from lmtune.errors import LmtuneError
from lmtune.evaluation.scoring import Scores
from lmtune.forward.packed import PackedForward
from lmtune.io.console import warn
from lmtune.io.text import format_list
from lmtune.kernels.lora_linear import drop_dense
from lmtune.models.device import return_freed_memory
from lmtune.models.tuning.base import TunedModel
from lmtune.objectives.base import Objective
from lmtune.parallel.base import Parallel
from lmtune.parallel.signals import Interrupted, StopSignals
from lmtune.training.memory import checkpoint_layers, is_checkpointed_throughout
from lmtune.training.optim import learning_rate, update
from lmtune.training.state import TrainState
from lmtune.training.step import StepResult, find_nonfinite_examples, step_gradients

_FREE_EVERY = 16  # steps; what is freed must be faulted in again, a fraction of a second each time
Action = Literal["continue", "stop"]


@dataclass
class StepEvent:
    """One finished step, as the hooks see it, one after another."""

    plan: StepPlan
    result: StepResult
    state: TrainState  # of the run after the step
    learning_rate: float
    seconds: float
    total_steps: int  # of the run
    is_interrupted: bool = False  # a rank was asked to stop; the state is to be saved
    is_last: bool = False  # no step follows, because it is the last one or an earlier hook ends the run
    validation: Scores | None = None  # what a hook has scored after this step


class StepHook(Protocol):
    """What is done between two steps: scoring, records, checkpoints, a bar, an early stop, pruning of a sweep."""

    def after_step(self, event: StepEvent) -> Action:
        """Called on every rank, which must all answer alike."""

    def on_failure(self, state: TrainState) -> None:
        """The next step cannot be made; the weights are those after `state.step`."""


@dataclass
class TrainingJob:
    """What the loop works with."""

    planner: Planner
    data: ExampleStore
    forward: PackedForward
    objective: Objective
    model: TunedModel
    optimizer: torch.optim.Optimizer
    parallel: Parallel
    train: TrainConfig
    parameters: dict[str, torch.nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = self.model.trainable()


def train(job: TrainingJob, hooks: Sequence[StepHook], state: TrainState) -> bool:
    """Make all steps that are left, change `state` with each, and tell the hooks of it in their order.

    Returns whether a hook ended the run before its last step. Raises LmtuneError if loss or gradient was not finite, or
    memory does not suffice for a single sequence; Interrupted if the run was asked to stop.
    """
    parallel, total_steps, is_stopped = job.parallel, job.planner.total_steps, False
    pin, shares = job.forward.device.type == "cuda", job.forward.shares_prefixes
    job.forward.model.train()
    with (
        StopSignals() as signals,
        BatchPrefetcher(job.planner, parallel.rank, job.data, shares, pin, job.objective.reads) as prefetcher,
    ):
        prefetcher.start(state.step + 1)
        while state.step < total_steps and not is_stopped:
            started = time.perf_counter()
            plan = prefetcher.next_step()
            parallel.phase = f"step {plan.step}"
            plan, result = gradients(job, prefetcher, plan, signals.asked)
            if not result.is_finite:
                for hook in hooks:
                    hook.on_failure(state)
                raise _not_finite(job, plan, result)
            rate = learning_rate(plan.step, total_steps, job.train)
            update(job.optimizer, job.parameters.values(), rate, result.grad_norm, job.train.max_grad_norm)
            seconds = time.perf_counter() - started
            _advance(state, plan, seconds, prefetcher.planner.micro_batch_tokens)
            stop = result.interrupted or (parallel.world_size == 1 and signals.asked())
            event = StepEvent(plan, result, state, rate, seconds, total_steps, stop, state.step == total_steps)
            for hook in hooks:
                is_stopped |= hook.after_step(event) == "stop"
                event.is_last |= is_stopped
            if plan.step % _FREE_EVERY == 0:
                return_freed_memory()
            if stop and not event.is_last:
                raise Interrupted(
                    f"stopped after step {state.step} of {total_steps}, which is saved; the same command resumes "
                    "from there", signals.exit_code,
                )  # fmt: skip
    return is_stopped


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step on one rank, so that dropout depends on nothing that came before."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def gradients(
    job: TrainingJob, prefetcher: BatchPrefetcher, plan: StepPlan, is_asked: Callable[[], bool] = lambda: False
) -> tuple[StepPlan, StepResult]:
    """The step's gradient; out of memory halves the micro-batches and makes the same step again.

    `is_asked` tells whether this process was asked to stop.
    """
    while True:
        seed_step(job.train.seed, plan.step, job.parallel.rank)
        num_passes = max(map(len, plan.micro_batches)) if job.parallel.equal_passes else 0
        result = step_gradients(
            job.forward, job.objective, job.parameters, prefetcher.batches(), plan.totals, job.parallel,
            is_asked, num_passes,
        )  # fmt: skip
        if not result.out_of_memory:
            return plan, result
        prefetcher.start(plan.step, _reduce_memory(job, prefetcher.planner, plan))
        plan = prefetcher.next_step()


def _reduce_memory(job: TrainingJob, planner: Planner, plan: StepPlan) -> Planner:
    """A plan that needs less memory: without dense copies of quantized weights, then with half the micro-batch, and
    when units stand alone already, with activation checkpointing.

    The step's examples, and so its update, stay the same.
    """
    base = job.forward.base

    def say(change: str) -> None:
        if job.parallel.is_main:
            warn(f"out of memory at step {plan.step}: {change} from here on (same result)")

    has_dropped = drop_dense(job.forward.model)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if has_dropped:
        say("no dense copies of quantized weights")
        return planner
    if planner.micro_batch_tokens > plan.longest:
        smaller = planner.with_budget(max(plan.longest, planner.micro_batch_tokens // 2))
        say(f"micro-batches of {smaller.micro_batch_tokens} tokens")
        return smaller
    if job.train.gradient_checkpointing == "auto" and not is_checkpointed_throughout(base):
        say("activation checkpointing for all layers, which is slower,")
        checkpoint_layers(base, base.config.get_text_config().num_hidden_layers)
        return planner
    raise LmtuneError(
        f"out of memory at step {plan.step} with a single sequence of {plan.longest} tokens; lower data.max_length, "
        "use model.quantization=nf4, a smaller model, or train.gradient_checkpointing=true"
    )


def _not_finite(job: TrainingJob, plan: StepPlan, result: StepResult) -> LmtuneError:
    """An error that names the examples that made the loss or gradient infinite or NaN, on whichever rank they were."""
    seed_step(job.train.seed, plan.step, job.parallel.rank)
    rank, of_ranks = job.parallel.rank, [sum(map(len, units)) for units in plan.micro_batches]
    others = (sum(of_ranks[:rank]), sum(of_ranks[rank + 1 :])) if job.parallel.equal_passes else (0, 0)
    examples = find_nonfinite_examples(
        job.forward, job.objective, job.parameters, plan.micro_batches[rank], job.data, job.parallel, others
    )
    examples = job.parallel.gather(examples)
    rows = format_list(sorted(set(examples))) if examples else "  none alone; the step as a whole"
    return LmtuneError(
        f"step {plan.step}: the loss ({result.loss}) or the gradient (norm {result.grad_norm}) is not finite. The "
        f"weights were not changed by this step. Non-finite examples:\n{rows}\n"
        "  look at these rows with `lmtune preview`; if they are fine, lower train.learning_rate"
    )


def _advance(state: TrainState, plan: StepPlan, seconds: float, micro_batch_tokens: int) -> None:
    state.step = plan.step
    state.elapsed_tokens += plan.totals.tokens
    state.elapsed_examples += plan.totals.examples
    state.seconds += seconds
    state.micro_batch_tokens = micro_batch_tokens
