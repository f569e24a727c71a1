"""How much memory a run needs, part by part, and the micro-batch that fits what is there.

What a token's activations weigh is estimated from the model's shape for `lmtune plan`, and measured on a few tokens
before training (`training.activations`). Layers are computed twice only as far as that is needed to hold the longest
row or a micro-batch that keeps the device busy. When all this was too bold, the step is redone with half the tokens,
which changes nothing but speed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from lmtune.kernels.cross_entropy import chunk_rows

GIB = 2**30
_SHARE = 0.6  # of the free memory, for activations; the rest is for what is not seen beforehand
# Tokens of a micro-batch beyond which nothing is gained, and below which computing layers twice is the lesser evil.
MOST_TOKENS = {"cuda": 16384, "cpu": 2048}
_ENOUGH_TOKENS = {"cuda": 2048, "cpu": 256}


@dataclass(frozen=True)
class ModelShape:
    """What memory and time depend on; sizes in elements."""

    num_layers: int
    hidden_size: int
    attention_width: int  # heads x head_dim
    intermediate_size: int
    vocabulary_size: int
    linear_parameters: int
    other_parameters: int
    adapter_parameters: int


@dataclass(frozen=True)
class ActivationBytes:
    """What the forward pass keeps for the backward pass, in bytes per token.

    Attributes:
        layer: of one layer.
        boundary: the input of a layer, all that is kept of one that is computed twice.
        outside: after the last layer.
        num_layers: of the model.
    """

    layer: float
    boundary: float
    outside: float
    num_layers: int

    def per_token(self, checkpointed: int) -> float:
        """At the most, with the first `checkpointed` layers computed twice: what is kept, and one layer at work."""
        kept = self.num_layers - checkpointed
        return kept * self.layer + checkpointed * self.boundary + self.layer + self.outside


@dataclass(frozen=True)
class MemoryEstimate:
    """GiB by part for a micro-batch of `micro_batch_tokens`."""

    base_weights: float
    adapter_and_optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """GiB in all."""
        return self.base_weights + self.adapter_and_optimizer + self.activations + self.logits


def shape_of(model: Any, adapter_parameters: int | None = None) -> ModelShape:
    """The shape of a loaded model; quantised layers count their real elements.

    Args:
        model: with or without an adapter, on any device, meta too.
        adapter_parameters: by default the model's trainable ones.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    head = base.get_output_embeddings()
    linear = sum(inputs * outputs for _, inputs, outputs in linear_layers(base))
    adapter = adapter_parameters or sum(p.numel() for p in base.parameters() if p.requires_grad)
    other = sum(p.numel() for m in base.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters(False))
    if head is not None and not config.tie_word_embeddings:
        other += head.weight.numel()
    hidden = int(config.hidden_size)
    heads = int(config.num_attention_heads)
    width = heads * int(getattr(config, "head_dim", None) or hidden // heads)
    intermediate = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    return ModelShape(
        int(config.num_hidden_layers), hidden, width, intermediate, int(config.vocab_size), linear, other, adapter
    )


def estimate(
    shape: ModelShape, tokens: int, quantization: str, dtype: torch.dtype, trained_share: float, checkpointed: int = 0
) -> MemoryEstimate:
    """The memory of one training step.

    Args:
        shape: of the model.
        tokens: in a micro-batch.
        quantization: of the base; fp8 weights stand beside the stored ones, by rows and by columns.
        dtype: of computation and of unquantised weights.
        trained_share: trained tokens / tokens.
        checkpointed: layers that are computed again in the backward pass.
    """
    wide = dtype.itemsize
    per_element = {"none": float(wide), "nf4": 0.516, "int8": 1.002, "fp8": wide + 2.0}[quantization]
    weights = shape.linear_parameters * per_element + shape.other_parameters * wide
    activations = tokens * estimated_activations(shape, dtype).per_token(checkpointed)
    rows = min(math.ceil(tokens * trained_share), chunk_rows("cpu" if wide == 4 else "cuda", shape.vocabulary_size))
    logits = rows * shape.vocabulary_size * 4 * 3  # of a chunk: fp32 logits, their softmax and gradient
    return MemoryEstimate(
        weights / GIB, shape.adapter_parameters * 16 / GIB, activations / GIB, logits / GIB
    )  # weight, gradient and two moments in fp32


def estimated_activations(shape: ModelShape, dtype: torch.dtype) -> ActivationBytes:
    """From the shape: the inputs of linear layers, of norms and of the activation function are kept."""
    boundary = shape.hidden_size * dtype.itemsize
    layer = (14 * shape.hidden_size + 5 * shape.intermediate_size) * max(dtype.itemsize, 3)
    return ActivationBytes(layer, boundary, 2 * boundary, shape.num_layers)


def fitting_micro_batch(
    activations: ActivationBytes, longest: int, free_bytes: int, device_type: str
) -> tuple[int, int]:
    """The micro-batch budget in tokens, and how many layers must be computed twice for it.

    Args:
        activations: of a token.
        longest: tokens of the longest row, which is never cut.
        free_bytes: memory left after the weights.
        device_type: `cuda` or `cpu`.
    """
    most = max(longest, MOST_TOKENS[device_type])
    wanted = max(longest, _ENOUGH_TOKENS[device_type])
    for checkpointed in range(activations.num_layers + 1):
        tokens = int(free_bytes * _SHARE / activations.per_token(checkpointed))
        if tokens >= wanted:
            return min(most, tokens), checkpointed
    return max(longest, tokens), activations.num_layers


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process has held: of the GPU's allocator, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def linear_layers(base: Any) -> list[tuple[str, int, int]]:
    """Name, inputs and outputs of the model's own linear layers, without the adapter's and the head."""
    from transformers.pytorch_utils import Conv1D  # GPT-2's, with the weight transposed

    adapter, head = ("lora_A", "lora_B", "lora_embedding"), base.get_output_embeddings()
    found = []
    for name, module in base.named_modules():
        if module is head or any(part in name for part in adapter):
            continue
        if isinstance(module, torch.nn.Linear):
            found.append((name, int(module.in_features), int(module.out_features)))
        elif isinstance(module, Conv1D):
            found.append((name, int(module.nx), int(module.nf)))
    return found
