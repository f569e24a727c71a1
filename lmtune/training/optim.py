"""AdamW, and its learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from lmtune.config.schema import TrainConfig
from lmtune.models.tuning.base import ParameterGroup


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


def adamw(groups: Sequence[ParameterGroup], betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.AdamW:
    """AdamW over `groups`, whose learning rate is set before each step."""
    return torch.optim.AdamW([dict(group) for group in groups], lr=0.0, betas=betas, fused=True)


def update(
    optimizer: torch.optim.Optimizer, parameters: Iterable[torch.nn.Parameter], rate: float, grad_norm: float,
    max_grad_norm: float | None,
) -> None:  # fmt: skip
    """Clip by the norm that is already known, and step at `rate`."""
    if max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, torch.tensor(grad_norm))
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    optimizer.step()
