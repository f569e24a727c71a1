"""AdamW, its moments in fp32 or 8 bit, and its learning rate as a pure function of the step: resuming needs no more."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch.distributed.tensor import DTensor

from lmtune.config.schema import TrainConfig
from lmtune.errors import ConfigError
from lmtune.io.text import one_line
from lmtune.models.tuning.base import ParameterGroup


def learning_rate(step: int, total_steps: int, train: TrainConfig) -> float:
    """The rate that `step` (counted from 1) of `total_steps` uses.

    It rises linearly over the first `warmup_ratio` of the steps, reaches `train.learning_rate` with the last of them,
    and then stays (`constant`) or falls to zero (`linear`, `cosine`).
    """
    assert not isinstance(train.learning_rate, str), "a run has found it before its first step"
    warmup_steps = math.ceil(train.warmup_ratio * total_steps - 1e-9)  # 0.07 * 100 is 7.000000000000001
    if step <= warmup_steps:
        return train.learning_rate * step / warmup_steps
    progress = (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps)  # in [0, 1)
    factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return train.learning_rate * factor[train.schedule]


Betas = tuple[float, float]


def adamw(groups: Sequence[ParameterGroup], betas: Betas = (0.9, 0.999)) -> torch.optim.Optimizer:
    """PyTorch's AdamW over `groups`, whose learning rate is set before each step."""
    alike = [{**group, "params": part} for group in groups for part in _alike(group["params"])]
    return torch.optim.AdamW(alike, lr=0.0, betas=betas, fused=True)


def adamw_8bit(groups: Sequence[ParameterGroup], betas: Betas = (0.9, 0.999)) -> torch.optim.Optimizer:
    """AdamW with its moments in 8 bit, in blocks (https://arxiv.org/abs/2110.02861); small tensors keep fp32."""
    from bitsandbytes.optim import AdamW8bit

    made: torch.optim.Optimizer = AdamW8bit([dict(group) for group in groups], lr=0.0, betas=betas)
    return made


# `train.optimizer`, and the bytes that it keeps of a trained weight.
OPTIMIZERS: dict[str, Callable[[Sequence[ParameterGroup]], torch.optim.Optimizer]] = {
    "adamw": adamw, "adamw_8bit": adamw_8bit,
}  # fmt: skip
MOMENT_BYTES = {"adamw": 8, "adamw_8bit": 2}


def check_optimizer(name: str, device: torch.device) -> None:
    """Try one step on `device`: each weight of a tensor that is large enough for 8 bit moves by the learning rate.

    Raises:
        ConfigError: the optimizer does not work there.
    """
    weight = torch.nn.Parameter(torch.zeros(64, 128, device=device))
    weight.grad = torch.ones_like(weight)
    try:
        update(OPTIMIZERS[name]([{"params": [weight]}]), [weight], 0.5, 1.0, None)
        if not bool(((weight + 0.5).abs() < 0.05).all()):
            raise RuntimeError("a step gave a wrong result")
    except Exception as error:  # of any kind: a missing library, or a kernel that the device does not have
        raise ConfigError(
            f"train.optimizer: {name} does not work on this device ({device.type}): {one_line(error)}; set "
            "train.optimizer: adamw (`lmtune doctor` looks at bitsandbytes)"
        ) from error


def update(
    optimizer: torch.optim.Optimizer, parameters: Iterable[torch.nn.Parameter], rate: float, grad_norm: float,
    max_grad_norm: float | None,
) -> None:  # fmt: skip
    """Clip by the norm that is already known, and step at `rate`."""
    if max_grad_norm is not None:
        for part in _alike(parameters):
            torch.nn.utils.clip_grads_with_norm_(part, max_grad_norm, torch.tensor(grad_norm))
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    optimizer.step()


def _alike(parameters: Iterable[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Those that each rank holds whole and those that are shared out, which no kernel takes together."""
    kinds: tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]] = ([], [])
    for parameter in parameters:
        kinds[isinstance(parameter, DTensor)].append(parameter)
    return [kind for kind in kinds if kind]
