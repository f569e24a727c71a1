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

from lmtune.batching.plan import Planner, TokenCost
from lmtune.config.schema import FinetuneConfig, FsdpConfig, FullConfig, LoraConfig, ModelConfig, PartialConfig
from lmtune.data.sequences import SequenceTable
from lmtune.errors import ModelError
from lmtune.io.text import size_text
from lmtune.models.base import describe_dtype, dtype_of, resolve_name
from lmtune.models.device import free_memory
from lmtune.models.head import Head
from lmtune.models.offload import can_stream, reason_to_stream
from lmtune.models.parameters import Parameters, count_parameters
from lmtune.models.structure import empty_model
from lmtune.models.tuning.lora import check_variant
from lmtune.objectives.chosen import unread_head
from lmtune.training import memory
from lmtune.training.memory import GIB, MemoryEstimate, ModelShape
from lmtune.training.optim import MOMENT_BYTES

_EFFICIENCY = 0.5  # of the matrix product's rate, what a whole step reaches at the least
_LAYER_SECONDS = {"cuda": 4e-4, "mps": 6e-4, "cpu": 8e-4}  # of Python's work in one layer for one token of an answer
_LIBRARY_SECONDS = 12.0  # torch, transformers, PEFT and bitsandbytes, imported on two cores
_DISK_BYTES = 5e8  # a second, read and put into place
_QUANTIZED_ON_CPU = 24e6  # elements a second in 4 bit; there is no native kernel for it


@dataclass(frozen=True)
class Seconds:
    """How long the parts of a run take."""

    loading: float  # libraries and the base model, quantized where asked
    training: float
    scoring: float  # the validation rows, before, during and after training
    answers: float  # generated for validation rows, by the base and by the tuned model

    @property
    def total(self) -> float:
        """Of the whole command."""
        return self.loading + self.training + self.scoring + self.answers


@dataclass(frozen=True)
class Forecast:
    """What `lmtune plan` prints."""

    steps: int
    rows: int
    tokens: int
    trained_tokens: int
    micro_batch_tokens: int
    checkpointed_layers: int
    precision: str
    memory: MemoryEstimate
    free_gib: float
    parameters: Parameters
    seconds: Seconds
    advice: tuple[str, ...]
    longest: int  # tokens of the row, or pair, that has the most; it is never cut
    longest_fitting: int
    offload: str = ""
    sharding: str = ""

    def lines(self) -> list[tuple[str, str]]:
        """Name and value of each line."""
        part, time_of = self.memory, self.seconds
        beside = [("dense copies of quantized weights", part.dense_copies)] * bool(part.dense_copies)
        beside += [("experts with their adapter added", part.expert_copies)] * bool(part.expert_copies)
        sizes = [
            ("base weights", part.base_weights), *beside, ("trained weights, optimizer", part.trained_and_optimizer),
            ("activations", part.activations), ("logits", part.logits),
        ]  # fmt: skip
        times = [
            ("loading", time_of.loading), ("training", time_of.training), ("scoring validation rows", time_of.scoring),
            ("generating answers", time_of.answers),
        ]  # fmt: skip
        return [
            ("rows", f"{self.rows:,}"),
            ("optimizer steps", f"{self.steps:,}"),
            ("tokens read", f"{self.tokens:,} ({self.trained_tokens / max(1, self.tokens):.0%} trained)"),
            ("longest row", f"{self.longest:,} tokens; up to about {self.longest_fitting:,} fit"),
            ("micro-batch", f"up to {self.micro_batch_tokens:,} tokens"),
            ("gradient checkpointing", f"{self.checkpointed_layers} layers" if self.checkpointed_layers else "off"),
            ("precision", self.precision),
            *[("offload", self.offload)] * bool(self.offload),
            *[("sharding", self.sharding)] * bool(self.sharding),
            ("parameters", self.parameters.describe()),
            *((f"memory: {name}", size_text(size)) for name, size in sizes),
            ("memory: total, estimated", f"{size_text(part.total)} of {size_text(self.free_gib)} free"),
            *((f"time: {name}", describe_seconds(seconds)) for name, seconds in times if seconds),
            ("time: total, estimated", describe_seconds(time_of.total)),
        ]


def forecast(
    config: FinetuneConfig, rows: SequenceTable, device: torch.device, processes: int,
    held_out: SequenceTable | None = None,
) -> Forecast:  # fmt: skip
    """Plan a run over the sequences of `rows`, scored on those of `held_out`; memory is that of one process."""
    dtype, quantization = dtype_of(config.model, device), config.model.quantization
    shape, parameters = planned_shape(config.model, config.tuning, dtype, unread_head(config.objective))
    share = float(rows.num_targets.sum() / rows.num_tokens.sum())
    free = free_memory(device) // (processes if device.type == "cpu" else 1)
    whole = memory.base_weights(shape, quantization, dtype)
    shards = processes if isinstance(config.parallel, FsdpConfig) else 1
    streams = can_stream(config.tuning) and shards == 1
    reason = reason_to_stream(config.model, whole, free) if streams else None
    resident = config.model.resident_layers if reason is not None else None
    left = max(0.0, free - memory.base_weights(shape, quantization, dtype, resident, shards))
    dense = memory.dense_copies(shape, quantization, dtype, left if resident is None and shards == 1 else 0)
    moments = MOMENT_BYTES[config.train.optimizer]
    left = max(0.0, left - dense - memory.trained_bytes(shape, dtype, moments, shards))
    setting = config.train.micro_batch_tokens
    kind = config.objective.rows
    longest = memory.longest_unit(rows, kind)
    budget, checkpointed = memory.fitting_micro_batch(
        memory.estimated_activations(shape, dtype), longest, int(left), device.type,
        None if setting == "auto" else setting, kind,
    )  # fmt: skip
    may_checkpoint = config.train.gradient_checkpointing is not False
    most = memory.longest_fitting(memory.estimated_activations(shape, dtype), left, device.type, may_checkpoint)
    if setting != "auto":
        budget = setting
    if config.train.gradient_checkpointing != "auto":
        checkpointed = shape.num_layers if config.train.gradient_checkpointing else 0
    num_rows, all_tokens = rows.rows_per_epoch, rows.tokens_per_epoch
    steps = Planner.count_steps(num_rows, config.train)
    epochs = steps * config.train.batch_size / num_rows
    tokens, per_step = int(all_tokens * epochs), int(all_tokens / num_rows * config.train.batch_size)
    micro_batch = min(max(budget, longest), per_step)
    part = memory.estimate(
        shape, micro_batch, quantization, dtype, share, checkpointed, dense, moments, resident, shards
    )  # fmt: skip
    rate = matmul_rate(device, dtype) * _EFFICIENCY * (processes if device.type == "cuda" else 1)
    again = 1 + checkpointed / shape.num_layers / 3
    work = tokens * flop_per_token(shape, share, _mean_context(rows.num_tokens))
    work += max(steps, tokens / max(1, micro_batch)) * 6 * shape.rank * shape.adapted_experts  # of each pass
    loaded = whole if shards > 1 else part.base_weights * GIB  # each process reads all, and keeps its part
    scoring, scorers = rate / shards, processes // shards  # sharded, each scores all rows
    seconds = Seconds(
        loading=_loading_seconds(shape, config.model, loaded, device.type),
        training=work * again / rate,
        scoring=0.0 if held_out is None else _scoring_seconds(shape, config, held_out, steps, scoring),
        answers=0.0 if held_out is None else _answer_seconds(shape, config, held_out, scoring, device.type, scorers),
    )
    advice = _advice(config, shape, part, free / GIB, device, checkpointed)
    if longest > most > 0:
        advice += (
            f"the longest row has {longest:,} tokens, and about {most:,} fit: set data.max_length={most}, with "
            "data.too_long=split to keep all of a plain text; no row is shared out over several devices",
        )
    precision = describe_dtype(config.model, device, dtype)
    offload = "" if reason is None else f"{resident} of {shape.num_layers} layers in memory at once: {reason}"
    sharding = "" if shards == 1 else f"a process holds 1/{shards} of each layer, and two layers at work"
    return Forecast(
        steps, num_rows, tokens, int(tokens * share), budget, checkpointed, precision, part, free / GIB,
        parameters, seconds, advice, longest, most, offload, sharding,
    )  # fmt: skip


def _mean_context(num_tokens: npt.NDArray[np.int32]) -> float:
    """The length of sequences, as their tokens have it in the mean."""
    return float((num_tokens.astype(float) ** 2).sum() / num_tokens.sum())


def _loading_seconds(shape: ModelShape, model: ModelConfig, weight_bytes: float, device_type: str) -> float:
    quantizing = shape.linear_parameters / _QUANTIZED_ON_CPU if model.quantization == "nf4" else 0.0
    return _LIBRARY_SECONDS + weight_bytes / _DISK_BYTES + (quantizing if device_type == "cpu" else 0.0)


def _scoring_seconds(shape: ModelShape, config: FinetuneConfig, rows: SequenceTable, steps: int, rate: float) -> float:
    """Forward passes over the validation rows: before training, every so many steps, and at the last step."""
    every = config.evaluation.every_steps
    passes = 1 + config.evaluation.score_base + ((steps - 1) // every if every else 0)
    tokens, share = float(rows.num_tokens.sum()), float(rows.num_targets.sum() / rows.num_tokens.sum())
    return passes * tokens * flop_per_token(shape, share, _mean_context(rows.num_tokens)) / 2 / rate


def _answer_seconds(
    shape: ModelShape, config: FinetuneConfig, rows: SequenceTable, rate: float, device_type: str, processes: int
) -> float:
    """Answers of the base, which seldom ends before the limit, and of the tuned model, of the rows' own lengths."""
    asked, limit = min(config.evaluation.exact_match_rows, rows.num_rows), config.evaluation.max_new_tokens
    if config.objective.rows != "answer":
        asked = 0
    if not asked:
        return 0.0
    last = rows.first[1 : asked + 1] - 1  # the sequence of each row whose answer is asked for
    answered = int(min(limit, rows.num_targets[last].max()))
    a_token = 2 * (shape.active_parameters + shape.vocabulary_size * shape.hidden_size)
    models = 1 + config.evaluation.score_base
    prompts = models * float(rows.num_tokens[last].sum()) * a_token / rate  # each model reads them
    rounds = answered + limit * config.evaluation.score_base
    return prompts + rounds * (asked / processes * a_token / rate + shape.num_layers * _LAYER_SECONDS[device_type])


def flop_per_token(shape: ModelShape, trained_share: float, sequence_tokens: float) -> float:
    """Floating point operations of one LoRA step per token: 4 N + 4 f H + 6 P + 7 s a L.

    N frozen linear parameters that a token meets, f the trained share, H the head's, P the adapter's outside of
    experts, s the length-weighted sequence length in tokens, a the attention's width, L layers. Recomputation is not
    counted, nor the product of an adapter over experts, which is made once in a pass.
    """
    cost = token_cost(shape)
    return _plain_flop(shape) * (1 + trained_share * cost.target + sequence_tokens / 2 * cost.before)


def token_cost(shape: ModelShape) -> TokenCost:
    """What attention and the head add to the work of a token, as `flop_per_token` counts it."""
    head = 4 * shape.vocabulary_size * shape.hidden_size
    pair = 14 * shape.attention_width * shape.num_layers  # a query and a key that it sees: half of all in a sequence
    return TokenCost(before=pair / _plain_flop(shape), target=head / _plain_flop(shape))


def _plain_flop(shape: ModelShape) -> float:
    """What every token needs in linear layers and adapters; the model's own weights that learn need their gradient."""
    adapters = 6 * (shape.adapter_parameters - shape.adapter_on_experts)
    return float(4 * shape.active_parameters + 2 * shape.own_linear + adapters)


def planned_shape(
    model: ModelConfig, tuning: LoraConfig | FullConfig | PartialConfig, dtype: torch.dtype, head: Head | None = None
) -> tuple[ModelShape, Parameters]:
    """The shape of `model` under `tuning`, and what is adapted and quantized, from its config alone.

    `head` makes a classifier of it.

    ModelError if the config cannot be read; ConfigError if a target names nothing, or the variant does not fit.
    """
    try:
        empty = empty_model(resolve_name(model.name), model.revision, head)
    except Exception as error:
        raise ModelError(f"model.name: cannot read the config of {model.name}: {error}") from error
    parameters = count_parameters(empty, tuning, model.quantization, dtype)
    if isinstance(tuning, LoraConfig):
        check_variant(empty, tuning, parameters.targets)
    return memory.shape_of(empty, parameters), parameters


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
    config: FinetuneConfig, shape: ModelShape, part: MemoryEstimate, free_gib: float, device: torch.device,
    checkpointed: int,
) -> tuple[str, ...]:  # fmt: skip
    found = []
    if part.total > free_gib:
        mostly_linear = shape.linear_parameters > shape.expert_parameters  # which can be quantized
        smaller = (
            "model.quantization=nf4" if config.model.quantization != "nf4" and mostly_linear else "a smaller model"
        )
        found.append(f"it does not fit the {free_gib:.1f} GiB that are free: try {smaller}, or a lower data.max_length")
        if shape.adapted_experts and part.total - part.expert_copies - part.trained_and_optimizer < free_gib:
            found.append("most of it is the adapter of the experts: tuning.target_modules without them needs less")
    elif checkpointed:
        found.append("activation checkpointing covers some layers; a lower data.max_length may avoid it")
    if device.type == "cpu" and part.base_weights > 2:
        found.append("a model of this size is slow on a CPU; a GPU is some hundred times faster")
    return tuple(found)
