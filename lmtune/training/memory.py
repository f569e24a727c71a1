"""How much memory a run needs, part by part, and the micro-batch that fits what is there.

An estimate from the model's shape, used before anything is known better: `lmtune plan` prints it, and training starts
from it. When it was too bold, the step is redone with half the tokens, which changes nothing but speed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from lmtune.models.loading import compute_dtype

GIB = 2**30
_SHARE = 0.6  # of the free memory, for activations; the rest is for what the estimate does not see
_DENSE_SHARE = 0.25  # of the free memory, for quantised weights kept as dense matrices
_MOST_TOKENS = 16384  # larger micro-batches gain nothing


@dataclass(frozen=True)
class ModelShape:
    """What memory and time depend on; sizes in elements."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocabulary_size: int
    linear_parameters: int
    other_parameters: int
    adapter_parameters: int


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
    intermediate = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    return ModelShape(
        int(config.num_hidden_layers), hidden, intermediate, int(config.vocab_size), linear, other, adapter
    )


def estimate(
    shape: ModelShape, tokens: int, quantization: str, dtype: torch.dtype, trained_share: float, checkpointing: bool
) -> MemoryEstimate:
    """The memory of one training step.

    Args:
        shape: of the model.
        tokens: in a micro-batch.
        quantization: `none`, `nf4` or `int8`.
        dtype: of computation and of unquantised weights.
        trained_share: trained tokens / tokens.
        checkpointing: whether layers are recomputed in the backward pass.
    """
    wide = dtype.itemsize
    per_element = {"none": float(wide), "nf4": 0.516, "int8": 1.002}[quantization]
    weights = shape.linear_parameters * per_element + shape.other_parameters * wide
    # the inputs of the linear layers, of norms and of the activation function are kept for the backward pass
    layer = (14 * shape.hidden_size + 5 * shape.intermediate_size) * max(wide, 3)
    kept_layers = 1 if checkpointing else shape.num_layers
    activations = tokens * (kept_layers * layer + shape.num_layers * shape.hidden_size * wide)
    logits = tokens * trained_share * shape.vocabulary_size * 4 * 3  # fp32 logits, their softmax and gradient
    return MemoryEstimate(
        weights / GIB, shape.adapter_parameters * 16 / GIB, activations / GIB, logits / GIB
    )  # weight, gradient and two moments in fp32


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on `device`; on the CPU shared with the other processes of this run."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _available_ram() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def fitting_micro_batch(
    shape: ModelShape, quantization: str, dtype: torch.dtype, trained_share: float, longest: int, free_bytes: int
) -> tuple[int, bool]:
    """The micro-batch budget in tokens, and whether layers must be recomputed to hold even the longest row.

    Args:
        longest: tokens of the longest row.
        free_bytes: memory left after the weights.
    """
    for checkpointing in (False, True):
        unit = estimate(shape, 1024, quantization, dtype, trained_share, checkpointing)
        per_token = (unit.activations + unit.logits) * GIB / 1024
        tokens = int(free_bytes * _SHARE / per_token)
        if tokens >= longest or checkpointing:
            return max(longest, min(_MOST_TOKENS, tokens)), checkpointing
    raise AssertionError("unreachable")


def dense_weights_fit(model: Any, device: torch.device) -> bool:
    """Whether a quantised base's weights may also be held as dense matrices: in a quarter of the free memory."""
    dense = shape_of(model).linear_parameters * compute_dtype(device).itemsize
    return dense <= free_memory(device) * _DENSE_SHARE


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


def _available_ram() -> int:
    """What Linux calls available, within this container's limit; elsewhere half of the physical memory."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit, \
             open("/sys/fs/cgroup/memory.current", encoding="ascii") as used:  # fmt: skip
            free = min(free, int(limit.read()) - int(used.read()))
    except (OSError, ValueError):  # no such limit, or "max"
        pass
    return max(free, 0)
