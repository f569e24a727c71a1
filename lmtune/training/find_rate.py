"""`train.learning_rate: find`: a learning rate from a range test, before the first step of a run.

    config = with_found_rate(run, parts)          # the config with a number; writes learning-rate.svg

The rate rises exponentially over 60 steps of throwaway training (L. Smith, Cyclical learning rates, 2017). The loss
falls slowly, then fast, and in the end it rises: what is taken is a tenth of the rate at which it was the least. What a
step shows of the loss depends on its examples too, so it is taken beside the loss of the same examples before training,
and smoothed. Afterwards every trained weight is what it was, and the run is the one that names the rate itself: bit for
bit, and when it is resumed, since `config.yaml` holds the number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lmtune.batching.prefetch import BatchPrefetcher
from lmtune.config.load import load_config
from lmtune.config.schema import FinetuneConfig
from lmtune.errors import LmtuneError
from lmtune.io.atomic import write_text
from lmtune.io.console import err, escape, progress
from lmtune.runs.plots import Axis, Curve, curves_svg
from lmtune.runs.store import RunDirectory
from lmtune.training.loop import TrainingJob, gradients
from lmtune.training.optim import update

if TYPE_CHECKING:
    from lmtune.training.compose import Components

PICTURE = "learning-rate.svg"
STEPS = 60
LOWEST, HIGHEST = 1e-6, 1.0
_SMOOTHING = 0.8  # of the mean so far, at each step
_DIVERGED = 0.3  # of the first loss: the smoothed loss is so far above the least
_BELOW_LEAST = 10.0


@dataclass(frozen=True)
class RangeTest:
    """What was measured, step by step.

    Attributes:
        rates: rising.
        changes: the loss of the step's examples less their loss before training; smoothed.
        found: the rate to train with.
    """

    rates: tuple[float, ...]
    changes: tuple[float, ...]
    found: float


def with_found_rate(run: RunDirectory, parts: Components) -> FinetuneConfig:
    """The run's settings with a number for the rate: that of its `config.yaml`, or found now; others stay as they are.

    Raises:
        LmtuneError: no rate made the loss fall.
    """
    config = parts.config
    if config.train.learning_rate != "find":
        return config
    parts.parallel.barrier()  # an earlier run was set aside
    if run.exists():
        known = load_config(FinetuneConfig, run.config).train.learning_rate
        return replace(config, train=replace(config.train, learning_rate=known))
    parts.precompute()
    tested = range_test(parts)
    if parts.parallel.is_main:
        write_text(run.path / PICTURE, picture(tested))
        err.print(escape(
            f"train.learning_rate: found {tested.found:g} by a range test of {len(tested.rates)} steps "
            f"({run.path / PICTURE})"
        ))  # fmt: skip
    return replace(config, train=replace(config.train, learning_rate=tested.found))


def range_test(parts: Components) -> RangeTest:
    """Train with rising rates, and put the weights back."""
    train = replace(
        parts.config.train, learning_rate=LOWEST, max_steps=STEPS, warmup_ratio=0.0, schedule="constant"
    )  # fmt: skip
    throwaway = replace(parts, config=replace(parts.config, train=train))
    job, _ = throwaway.job()
    before = {name: parameter.detach().clone() for name, parameter in job.parameters.items()}
    try:
        with progress("finding a learning rate", 2 * STEPS, "steps") as shown:
            first = _losses(job, None, shown.advance)
            found = _losses(job, rates(), shown.advance, first)
    finally:
        with torch.no_grad():
            for name, parameter in job.parameters.items():
                parameter.copy_(before[name])
                parameter.grad = None
    changes = _smoothed([loss - start for loss, start in zip(found, first, strict=False)])
    return RangeTest(rates()[: len(changes)], changes, choose(rates(), changes))


def rates() -> tuple[float, ...]:
    """Of all steps."""
    return tuple(LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1)) for step in range(STEPS))


def choose(tested: tuple[float, ...], changes: tuple[float, ...]) -> float:
    """A tenth of the rate at which the smoothed loss is the least, in two digits.

    Raises:
        LmtuneError: it is never below what it was.
    """
    least = min(range(len(changes)), key=changes.__getitem__)
    if changes[least] >= 0:
        raise LmtuneError(
            "train.learning_rate: find: no rate made the loss fall in a test of "
            f"{len(changes)} steps; name a rate, or look at the rows with `lmtune preview`"
        )
    return float(f"{tested[least] / _BELOW_LEAST:.1e}")


def picture(tested: RangeTest) -> str:
    """The change of the loss over the rates."""
    points = [(a, b, f"{a:.2e}: {b:+.4f}") for a, b in zip(tested.rates, tested.changes, strict=True)]
    top = max(tested.changes[0], 0.0) - 0.3 * min(tested.changes)  # what diverges is not drawn to its end
    up = Axis.of("change of the loss, smoothed", [*tested.changes[:1], min(tested.changes), top])
    return curves_svg(
        "Range test of the learning rate", Axis.of("learning rate", tested.rates, is_log=True), up,
        [Curve("change of the loss", points, is_strong=True)], (tested.found, f"found: {tested.found:g}"),
    )  # fmt: skip


def _losses(
    job: TrainingJob, tested: tuple[float, ...] | None, advance: Callable[[], None], first: list[float] | None = None
) -> list[float]:
    """The loss of each step, at rates that rise, or without an update; ends where the loss diverges."""
    found = list[float]()
    job.forward.model.train()
    with BatchPrefetcher(
        job.planner, job.parallel.rank, job.data, job.forward.shares_prefixes, False, job.objective.reads
    ) as prefetcher:
        prefetcher.start(1)
        for step in range(STEPS):
            _, result = gradients(job, prefetcher, prefetcher.next_step())
            if not result.is_finite:
                break
            found.append(result.loss)
            if tested is not None:
                update(job.optimizer, job.parameters.values(), tested[step], result.grad_norm, job.train.max_grad_norm)
            if first is not None and _has_diverged(found, first):
                break
            advance()
    return found


def _has_diverged(found: list[float], first: list[float]) -> bool:
    changes = _smoothed([loss - start for loss, start in zip(found, first, strict=False)])
    return changes[-1] > min(changes) + _DIVERGED * abs(first[0])


def _smoothed(values: list[float]) -> tuple[float, ...]:
    """The exponential moving average, without the bias of its beginning."""
    mean, weight, found = 0.0, 0.0, list[float]()
    for value in values:
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        found.append(mean / weight if math.isfinite(mean) else math.inf)
    return tuple(found)
