"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from lmtune.config.schema import TrainConfig


def learning_rate(step: int, total_steps: int, train: TrainConfig) -> float:
    """The rate that `step` (counted from 1) of `total_steps` uses.

    It rises linearly over the first `warmup_ratio` of the steps, reaches `train.learning_rate` with the last of them,
    and then stays (`constant`) or falls to zero (`linear`, `cosine`).
    """
    warmup_steps = math.ceil(train.warmup_ratio * total_steps - 1e-9)  # 0.07 * 100 is 7.000000000000001
    if step <= warmup_steps:
        return train.learning_rate * step / warmup_steps
    progress = (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps)  # in [0, 1)
    factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return train.learning_rate * factor[train.schedule]
