"""How much memory a run needs, part by part, and the micro-batch that fits what is there.

What a token's activations weigh is estimated from the model's shape for `lmtune plan`, and measured on a few tokens
before training (`training.activations`). Activation checkpointing covers only as many layers as it takes to hold the
longest sequence or a micro-batch that keeps the device busy. When all this was too bold, the step is redone with half
the tokens, which changes nothing but speed.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmtune.batching.packing import MicroBatch, pack
from lmtune.data.sequences import SequenceTable
from lmtune.data.types import RowKind, TokenSequence
from lmtune.forward.packed import PackedForward
from lmtune.kernels.cross_entropy import chunk_rows
from lmtune.models.device import DENSE_SHARE, is_out_of_memory, return_freed_memory
from lmtune.models.offload import QUANTIZED_BYTES
from lmtune.models.parameters import Parameters
from lmtune.models.structure import base_of, decoder_layers

GIB = 2**30
_PROBE_TOKENS = (64, 128)  # on which activations are measured before the first step, with no layer checkpointed
# Of the free memory, for activations; the rest is for what is not seen beforehand. A GPU says when it was too much.
_SHARE = {"cuda": 0.75, "mps": 0.6, "cpu": 0.6}
# Tokens of a micro-batch beyond which nothing is gained, and below which computing layers twice is the lesser evil.
MOST_TOKENS = {"cuda": 16384, "mps": 4096, "cpu": 2048}
_ENOUGH_TOKENS = {"cuda": 2048, "mps": 512, "cpu": 256}
# Of pairs on a CPU: they bring the prefix that they share, so more of them in a micro-batch give memory to fill only.
_MOST_OF_PAIRS = {"cpu": 512}


@dataclass(frozen=True)
class ModelShape:
    """What memory and time depend on; sizes in elements."""

    num_layers: int
    hidden_size: int
    attention_width: int  # heads x head_dim
    intermediate_size: int  # of all experts that a token passes through together
    vocabulary_size: int
    linear_parameters: int
    other_parameters: int
    adapter_parameters: int
    own_parameters: int = 0  # of the model itself that learn
    own_linear: int = 0  # of those, in linear layers and experts
    expert_parameters: int = 0
    active_share: float = 1.0  # of the experts, that a token passes through
    adapted_linear: int = 0  # elements under the adapter
    adapted_experts: int = 0
    adapter_on_experts: int = 0  # of the adapter's parameters
    rank: int = 0

    @property
    def active_parameters(self) -> float:
        """Of linear layers and experts, what a token is multiplied with."""
        return self.linear_parameters + self.active_share * self.expert_parameters


@dataclass(frozen=True)
class ActivationBytes:
    """What the forward pass keeps for the backward pass, in bytes per token."""

    layer: float  # of one layer
    boundary: float  # the input of a layer, all that is kept of a checkpointed one
    outside: float  # after the last layer
    num_layers: int
    fixed: float = 0.0  # of one layer however many tokens there are: experts with their adapter added, for one

    def per_token(self, checkpointed: int) -> float:
        """At the most, with the first `checkpointed` layers checkpointed: what is kept, and one layer at work."""
        kept = self.num_layers - checkpointed
        return kept * self.layer + checkpointed * self.boundary + self.layer + self.outside

    def constant(self, checkpointed: int) -> float:
        """Bytes that do not grow with the tokens, with the first `checkpointed` layers checkpointed."""
        return (min(self.num_layers, self.num_layers - checkpointed + 1)) * self.fixed


@dataclass(frozen=True)
class MemoryEstimate:
    """GiB by part for a micro-batch of `micro_batch_tokens`."""

    base_weights: float
    trained_and_optimizer: float
    activations: float
    logits: float
    dense_copies: float = 0.0
    expert_copies: float = 0.0

    @property
    def total(self) -> float:
        """GiB in all."""
        return float(sum(astuple(self)))


def shape_of(model: Any, parameters: Parameters) -> ModelShape:
    """The shape of a model on any device, meta too; `parameters` were counted before an adapter was attached."""
    config = base_of(model).config.get_text_config()
    layers, hidden, heads = int(config.num_hidden_layers), int(config.hidden_size), int(config.num_attention_heads)
    width = heads * int(getattr(config, "head_dim", None) or hidden // heads)
    intermediate = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    active = 1.0
    if parameters.experts:
        active = min(1.0, _experts_per_token(config) / parameters.num_experts)
        # gate, up and down projection of what a token passes through, as if it were one
        intermediate = max(1, round(active * parameters.experts / layers / hidden / 3))
    return ModelShape(
        layers, hidden, width, intermediate, int(config.vocab_size), parameters.linear, parameters.other,
        parameters.adapter, parameters.own, parameters.own_linear, parameters.experts, active,
        parameters.adapted_linear, parameters.adapted_experts, parameters.trained_on_experts, parameters.rank,
    )  # fmt: skip


def _experts_per_token(config: Any) -> int:
    """How many experts a token passes through, by the names that configs have for it; 1 where none is known."""
    names = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "top_k_experts", "moe_topk", "moe_k")
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), 1)


def base_weights(
    shape: ModelShape, quantization: str, dtype: torch.dtype, resident_layers: int | None = None, shards: int = 1
) -> float:
    """Bytes of the frozen weights; experts, embeddings, head, router and norms are not quantized.

    With `resident_layers` no more decoder layers than these are in memory; else all of them are. With `shards` a
    process holds one of so many parts of each layer, and the layers that it has gathered.
    """
    layers = _layers_bytes(shape, quantization, dtype) - shape.own_linear * dtype.itemsize
    others = (shape.other_parameters - shape.own_parameters + shape.own_linear) * dtype.itemsize
    if shards > 1:
        scales = shape.linear_parameters * (QUANTIZED_BYTES.get(quantization, 0.0) % 0.5)  # what is beside the codes
        return (layers - scales) / shards + scales + gathered_bytes(shape, quantization, dtype) + others
    resident = 1.0 if resident_layers is None else min(1.0, resident_layers / shape.num_layers)
    return layers * resident + others


def gathered_bytes(shape: ModelShape, quantization: str, dtype: torch.dtype) -> float:
    """Bytes of the sharded layers that are whole at once: one as it was received, and one at work or the next one."""
    return 2 * _layers_bytes(shape, quantization, dtype) / shape.num_layers


def _layers_bytes(shape: ModelShape, quantization: str, dtype: torch.dtype) -> float:
    wide = dtype.itemsize
    return shape.linear_parameters * QUANTIZED_BYTES.get(quantization, wide) + shape.expert_parameters * wide


def trained_bytes(shape: ModelShape, dtype: torch.dtype, moments: int = 8, shards: int = 1) -> int:
    """Of what is trained: weight, gradient and `moments` bytes; of own weights also copies in a narrow `dtype`.

    With `shards` a process holds one of so many parts of the layers' own weights.
    """
    narrow = dtype.itemsize if dtype.itemsize < 4 else 0
    own = shape.own_parameters - shape.own_linear + shape.own_linear // shards
    return (8 + moments) * (shape.adapter_parameters + own) + narrow * own


def dense_copies(shape: ModelShape, quantization: str, dtype: torch.dtype, free_bytes: float) -> float:
    """Bytes of dense matrices beside quantized weights: of all where `free_bytes` has room, else of the one at work."""
    size = shape.adapted_linear * dtype.itemsize if quantization in QUANTIZED_BYTES else 0
    if size <= free_bytes * DENSE_SHARE:
        return size
    largest = shape.hidden_size * max(shape.intermediate_size, shape.attention_width) * dtype.itemsize
    return min(largest, size / shape.num_layers)


def estimate(
    shape: ModelShape, tokens: int, quantization: str, dtype: torch.dtype, trained_share: float, checkpointed: int = 0,
    dense_bytes: float = 0, moments: int = 8, resident_layers: int | None = None, shards: int = 1,
) -> MemoryEstimate:  # fmt: skip
    """The memory of one training step over a micro-batch of `tokens`, of which `trained_share` are trained.

    `dtype` is that of computation and of unquantized weights; `checkpointed` is a number of layers; `dense_bytes` are
    those of matrices held beside quantized weights; `moments` are those that the optimizer keeps of a trained weight;
    `resident_layers` and `shards` are as in `base_weights`.
    """
    wide = dtype.itemsize
    activations = estimated_activations(shape, dtype)
    rows = min(math.ceil(tokens * trained_share), chunk_rows("cpu" if wide == 4 else "cuda", shape.vocabulary_size))
    logits = rows * shape.vocabulary_size * 4 * 3  # of a chunk: fp32 logits, their softmax and gradient
    trained = trained_bytes(shape, dtype, moments, shards)
    # what `measure_activations` keeps has the room of gradients, moments and logits, which come later
    measured = _PROBE_TOKENS[1] * (activations.num_layers * activations.layer + activations.outside)
    measured = 0.0 if shards > 1 else measured  # not where weights are gathered
    room = trained - 4 * (shape.adapter_parameters + shape.own_parameters) + logits
    return MemoryEstimate(
        base_weights=base_weights(shape, quantization, dtype, resident_layers, shards) / GIB,
        trained_and_optimizer=trained / GIB,
        activations=max(tokens * activations.per_token(checkpointed), measured - room) / GIB,
        logits=logits / GIB,
        dense_copies=dense_bytes / GIB,
        expert_copies=activations.constant(checkpointed) / GIB,
    )


def estimated_activations(shape: ModelShape, dtype: torch.dtype) -> ActivationBytes:
    """From the shape: the inputs of linear layers, of norms and of the activation function are kept."""
    boundary = shape.hidden_size * dtype.itemsize
    # 10 and 4 are kept (`measure_activations`); the rest comes and goes, or is what allocators lose between blocks
    layer = (12 * shape.hidden_size + 4.5 * shape.intermediate_size) * max(dtype.itemsize, 3)
    # the sum of an expert's weight and its adapter's product is kept for the backward pass
    fixed = shape.adapted_experts * dtype.itemsize / shape.num_layers
    return ActivationBytes(layer, boundary, 2 * boundary, shape.num_layers, fixed)


def most_tokens(device_type: str, rows: RowKind) -> int:
    """The tokens of a micro-batch of such rows beyond which nothing is gained."""
    most = MOST_TOKENS[device_type]
    return _MOST_OF_PAIRS.get(device_type, most) if rows == "pair" else most


def longest_unit(table: SequenceTable, rows: RowKind) -> int:
    """The most tokens that must share a micro-batch: of a sequence, or of the two of a pair."""
    of_rows = np.add.reduceat(table.num_tokens, table.first[:-1]) if rows == "pair" else table.num_tokens
    return int(of_rows.max())


def fitting_micro_batch(
    activations: ActivationBytes, longest: int, free_bytes: int, device_type: str, asked: int | None = None,
    rows: RowKind = "answer",
) -> tuple[int, int]:  # fmt: skip
    """The micro-batch budget in tokens that `free_bytes` hold, and how many layers must be checkpointed for it.

    The `longest` unit is never cut. `asked` is the budget of the settings; None leaves it to the memory.
    """
    most = max(longest, asked or most_tokens(device_type, rows))
    wanted = max(longest, asked or _ENOUGH_TOKENS[device_type])
    for checkpointed in range(activations.num_layers + 1):
        room = free_bytes * _SHARE[device_type] - activations.constant(checkpointed)
        tokens = max(0, int(room / activations.per_token(checkpointed)))
        if tokens >= wanted:
            return min(most, tokens), checkpointed
    return max(longest, tokens), activations.num_layers


def longest_fitting(activations: ActivationBytes, free_bytes: float, device_type: str, checkpoints: bool = True) -> int:
    """About how many tokens the longest row can have: alone in a pass, with every layer checkpointed if they may be."""
    layers = activations.num_layers if checkpoints else 0
    room = free_bytes * _SHARE[device_type] - activations.constant(layers)
    return max(0, int(room / activations.per_token(layers)))


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process has held: of the GPU's allocator, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    with contextlib.suppress(OSError, StopIteration):  # Linux; `ru_maxrss` would begin with what the parent held
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024 / GIB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB  # in bytes, on macOS


def measure_activations(forward: PackedForward, trained_share: float) -> ActivationBytes | None:
    """Bytes kept per token of a row, of which `trained_share` are trained, by the model as it will be trained.

    None for a model without one list of layers, or without memory for a few tokens.
    """
    layers = decoder_layers(forward.base)
    if layers is None:
        return None
    training = forward.model.training
    forward.model.train()
    try:
        short, long = (_kept(forward, layers, trained_share, tokens) for tokens in _PROBE_TOKENS)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            return None  # the first step will say what to do
        raise
    finally:
        forward.model.train(training)
        return_freed_memory()
    # the difference, since some of what is kept is there once, however many tokens there are
    more = _PROBE_TOKENS[1] - _PROBE_TOKENS[0]
    per_layer = [max(0, b - a) / more for a, b in zip(short, long, strict=True)]
    fixed = [max(0.0, a - each * _PROBE_TOKENS[0]) for a, each in zip(short, per_layer, strict=True)]
    boundary = forward.base.config.get_text_config().hidden_size * forward.dtype.itemsize
    # of a body that is frozen nothing is kept, but what runs through it is there
    layer = max(boundary, *per_layer[:-1])
    return ActivationBytes(layer, float(boundary), per_layer[-1], len(layers), max(fixed[:-1]))


def _kept(forward: PackedForward, layers: Any, trained_share: float, tokens: int) -> list[int]:
    """Bytes that autograd keeps of one row: by layer, and last outside the layers."""
    watch = _Watch(forward.model, layers)
    with watch, forward.context():
        forward(_random_row(forward, trained_share, tokens))
    return watch.sizes


def checkpoint_layers(base: Any, count: int) -> None:
    """Checkpoint the activations of the first `count` layers of a transformers model, and of no others.

    What is kept for the first layers is kept the longest.
    """
    if not count:
        return
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    layers = decoder_layers(base)
    for layer in [] if layers is None else layers[count:]:
        layer.gradient_checkpointing = False  # type: ignore[assignment]


def is_checkpointed_throughout(base: Any) -> bool:
    """Whether every layer is checkpointed already."""
    layers = decoder_layers(base)
    marks = [base] if layers is None else layers
    return all(getattr(layer, "gradient_checkpointing", False) for layer in marks)


def checkpointed_layers(base: Any) -> int:
    """How many layers are checkpointed."""
    return sum(bool(getattr(layer, "gradient_checkpointing", False)) for layer in decoder_layers(base) or ())


class _Watch:
    """Counts what autograd keeps inside the block: `sizes[i]` bytes for layer i, the last entry for all else."""

    def __init__(self, model: Any, layers: Any) -> None:
        self.sizes = [0] * (len(layers) + 1)
        self._layers, self._now, self._held = layers, len(layers), list[torch.Tensor]()
        self._seen = {parameter.untyped_storage()._cdata for parameter in model.parameters()}  # wherever they are
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for index, layer in enumerate(self._layers):
            self._handles.append(layer.register_forward_pre_hook(lambda *_, index=index: self._enter(index)))
            self._handles.append(layer.register_forward_hook(lambda *_: self._enter(len(self._layers))))
        self._hooks.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)
        self._held.clear()
        for handle in self._handles:
            handle.remove()

    def _enter(self, index: int) -> None:
        self._now = index

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._held.append(tensor)  # so that its address is not used again
            self.sizes[self._now] += storage.nbytes()
        return tensor.detach()  # an operation that keeps its own result would else hold the graph, and itself, for ever


def _random_row(forward: PackedForward, trained_share: float, tokens: int) -> MicroBatch:
    embedding = forward.base.get_input_embeddings().weight
    ids = np.random.default_rng(0).integers(0, embedding.shape[0], tokens)
    count = min(max(1, round(trained_share * tokens)), tokens - 1)  # nothing predicts the first
    trained = np.arange(tokens) >= tokens - count
    row = TokenSequence(ids.astype(np.int32), trained)
    return pack([row], [0], 1, reads=forward.reads).to(embedding.device)
