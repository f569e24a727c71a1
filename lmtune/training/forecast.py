"""What a run will need, from the rows' lengths and the model's shape; no weight is loaded.

Memory comes from `lmtune.training.memory`; time from the work of a step, counted in floating point operations, and a
short measurement of what this device does with a matrix product. Both are estimates and are called so.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lmtune.config import AdapterConfig, FinetuneConfig, ModelConfig
from lmtune.errors import ModelError
from lmtune.models.adapters import check_targets, is_target
from lmtune.models.free_memory import free_memory
from lmtune.models.loading import compute_dtype, resolve_name
from lmtune.models.weight_types import empty_model
from lmtune.training import memory
from lmtune.training.memory import GIB, MemoryEstimate, ModelShape
from lmtune.training.plan import Plan, TokenCost

_EFFICIENCY = 0.5  # of the matrix product's rate, what a whole step reaches at the least


@dataclass(frozen=True)
class Forecast:
    """What `lmtune plan` prints. `seconds` is for all steps on all processes together."""

    steps: int
    rows: int
    tokens: int
    trained_tokens: int
    micro_batch_tokens: int
    checkpointed_layers: int
    memory: MemoryEstimate
    free_gib: float
    adapter_parameters: int
    seconds: float
    advice: tuple[str, ...]

    def lines(self) -> list[tuple[str, str]]:
        """Name and value of each line."""
        part = self.memory
        return [
            ("rows", f"{self.rows:,}"),
            ("optimizer steps", f"{self.steps:,}"),
            ("tokens read", f"{self.tokens:,} ({self.trained_tokens / max(1, self.tokens):.0%} trained)"),
            ("micro-batch", f"up to {self.micro_batch_tokens:,} tokens"),
            ("gradient checkpointing", f"{self.checkpointed_layers} layers" if self.checkpointed_layers else "off"),
            ("adapter", f"{self.adapter_parameters:,} parameters"),
            ("memory: base weights", f"{part.base_weights:.2f} GiB"),
            ("memory: adapter, optimizer", f"{part.adapter_and_optimizer:.2f} GiB"),
            ("memory: activations", f"{part.activations:.2f} GiB"),
            ("memory: logits", f"{part.logits:.2f} GiB"),
            ("memory: total, estimated", f"{part.total:.2f} GiB of {self.free_gib:.1f} free"),
            ("time, estimated", describe_seconds(self.seconds)),
        ]


def forecast(
    config: FinetuneConfig, num_tokens: npt.NDArray[np.int32], num_trained: npt.NDArray[np.int32],
    device: torch.device, processes: int,
) -> Forecast:  # fmt: skip
    """Plan a run of rows with `num_tokens[rows]` tokens, `num_trained[rows]` of them trained.

    Raises:
        ModelError: the model's config cannot be read.
        ConfigError: the adapter's targets do not fit the model.
    """
    shape = planned_shape(config.model, config.adapter)
    dtype = compute_dtype(device, config.model.dtype)
    share = float(num_trained.sum() / num_tokens.sum())
    free = free_memory(device) // (processes if device.type == "cpu" else 1)
    longest = int(num_tokens.max())
    weights = memory.estimate(shape, 1, config.model.quantization, dtype, share).base_weights * GIB
    budget, checkpointed = memory.fitting_micro_batch(
        memory.estimated_activations(shape, dtype), longest, max(0, int(free - weights)), device.type
    )
    if config.train.micro_batch_tokens != "auto":
        budget = config.train.micro_batch_tokens
    if config.train.gradient_checkpointing != "auto":
        checkpointed = shape.num_layers if config.train.gradient_checkpointing else 0
    steps = Plan.count_steps(len(num_tokens), config.train)
    epochs = steps * config.train.batch_size / len(num_tokens)
    tokens, per_step = int(num_tokens.sum() * epochs), int(num_tokens.mean() * config.train.batch_size)
    part = memory.estimate(
        shape, min(max(budget, longest), per_step), config.model.quantization, dtype, share, checkpointed
    )
    rate = matmul_rate(device, dtype) * _EFFICIENCY * (processes if device.type == "cuda" else 1)
    work = flop_per_token(shape, share, float((num_tokens.astype(float) ** 2).sum() / num_tokens.sum()))
    seconds = tokens * work * (1 + checkpointed / shape.num_layers / 3) / rate
    advice = _advice(config, part, free / GIB, device, checkpointed)
    return Forecast(
        steps, len(num_tokens), tokens, int(tokens * share), budget, checkpointed, part, free / GIB,
        shape.adapter_parameters, seconds, advice,
    )  # fmt: skip


def flop_per_token(shape: ModelShape, trained_share: float, document_tokens: float) -> float:
    """Floating point operations of one LoRA step per token: 4 N + 4 f H + 6 P + 7 s a L.

    N frozen linear parameters, f the trained share, H the head's, P the adapter's, s the length-weighted document
    length in tokens, a the attention's width, L layers. Recomputation is not counted.
    """
    cost = token_cost(shape)
    return _plain_flop(shape) * (1 + trained_share * cost.trained + document_tokens / 2 * cost.before)


def token_cost(shape: ModelShape) -> TokenCost:
    """What attention and the head add to the work of a token, as `flop_per_token` counts it."""
    head = 4 * shape.vocabulary_size * shape.hidden_size
    pair = 14 * shape.attention_width * shape.num_layers  # a query and a key that it sees: half of all in a document
    return TokenCost(before=pair / _plain_flop(shape), trained=head / _plain_flop(shape))


def _plain_flop(shape: ModelShape) -> float:
    """What every token needs in linear layers and adapters."""
    return float(4 * shape.linear_parameters + 6 * shape.adapter_parameters)


def planned_shape(model: ModelConfig, adapter: AdapterConfig) -> ModelShape:
    """The shape of `model` with `adapter`, from its config alone.

    Raises:
        ModelError: the model's config cannot be read.
        ConfigError: a target module matches nothing in the model.
    """
    try:
        empty = empty_model(resolve_name(model.name), model.revision)
    except Exception as error:
        raise ModelError(f"model.name: cannot read the config of {model.name}: {error}") from error
    check_targets(empty, adapter.target_modules)
    parameters = sum(
        adapter.rank * (inputs + outputs)
        for name, inputs, outputs in memory.linear_layers(empty)
        if is_target(name, adapter.target_modules)
    )
    return memory.shape_of(empty, adapter_parameters=parameters)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations per second of a matrix product on `device`, measured in well under a second."""
    size = 4096 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def describe_seconds(seconds: float) -> str:
    """`about 3 min`, in the unit a person would choose."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"about {seconds / unit:.0f} {name}"
    return f"about {max(1, round(seconds))} s"


def _advice(
    config: FinetuneConfig, part: MemoryEstimate, free_gib: float, device: torch.device, checkpointed: int
) -> tuple[str, ...]:
    found = []
    if part.total > free_gib:
        smaller = "model.quantization=nf4" if config.model.quantization != "nf4" else "a smaller model"
        found.append(f"it does not fit the {free_gib:.1f} GiB that are free: try {smaller}, or a lower data.max_length")
    elif checkpointed:
        found.append("some layers are computed twice to save memory; a lower data.max_length may avoid it")
    if device.type == "cpu" and part.base_weights > 2:
        found.append("a model of this size is slow on a CPU; a GPU is some hundred times faster")
    return tuple(found)
