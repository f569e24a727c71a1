"""What a token's activations weigh, measured on the model itself, and which layers are computed twice to save them.

Two forward passes over a few random tokens are watched through PyTorch's saved-tensor hooks: every tensor that autograd
keeps for the backward pass is counted once, with the layer that made it. That holds for any model, adapter, dropout
and kernel, on any device, without a guess at the code.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from lmtune.batching.packing import pack
from lmtune.forward.packed import PackedForward
from lmtune.kernels.label_only_layer import decoder_layers
from lmtune.models.memory import is_out_of_memory
from lmtune.training.memory import ActivationBytes

_PROBE_TOKENS = (64, 128)


def measure_activations(forward: PackedForward, trained_share: float) -> ActivationBytes | None:
    """Bytes kept per token of a row, or None for a model without one list of layers, or no memory for a few tokens.

    Args:
        forward: the model, with its adapter, in the way it will be trained.
        trained_share: trained tokens / tokens.
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
    # the difference, since some of what is kept is there once, however many tokens there are
    more = _PROBE_TOKENS[1] - _PROBE_TOKENS[0]
    per_layer = [max(0, b - a) / more for a, b in zip(short, long, strict=True)]
    fixed = [max(0.0, a - each * _PROBE_TOKENS[0]) for a, each in zip(short, per_layer, strict=True)]
    boundary = forward.base.config.get_text_config().hidden_size * forward.base.dtype.itemsize
    return ActivationBytes(max(per_layer[:-1]), float(boundary), per_layer[-1], len(layers), max(fixed[:-1]))


def _kept(forward: PackedForward, layers: Any, trained_share: float, tokens: int) -> list[int]:
    """Bytes that autograd keeps of one row: by layer, and last outside the layers."""
    watch = _Watch(forward.model, layers)
    with watch, forward.ready():
        forward(_random_row(forward, trained_share, tokens))
    return watch.sizes


def checkpoint_layers(base: Any, count: int) -> None:
    """Let the first `count` layers of a transformers model be computed again in the backward pass, the others not.

    What is kept for the first layers is kept the longest.
    """
    if not count:
        return
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    layers = decoder_layers(base)
    for layer in [] if layers is None else layers[count:]:
        layer.gradient_checkpointing = False


def is_checkpointed_throughout(base: Any) -> bool:
    """Whether every layer is computed again already."""
    layers = decoder_layers(base)
    marks = [base] if layers is None else layers
    return all(getattr(layer, "gradient_checkpointing", False) for layer in marks)


class _Watch:
    """Counts what autograd keeps inside the block: `sizes[i]` bytes for layer i, the last entry for all else."""

    def __init__(self, model: Any, layers: Any) -> None:
        self.sizes = [0] * (len(layers) + 1)
        self._layers, self._now, self._held = layers, len(layers), list[torch.Tensor]()
        self._seen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
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
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._held.append(tensor)  # so that its address is not used again
            self.sizes[self._now] += storage.nbytes()
        return tensor


def _random_row(forward: PackedForward, trained_share: float, tokens: int) -> Any:
    embedding = forward.base.get_input_embeddings().weight
    ids = np.random.default_rng(0).integers(0, embedding.shape[0], tokens)
    trained = np.arange(tokens) >= tokens - max(1, round(trained_share * tokens))
    row = SimpleNamespace(documents=[SimpleNamespace(input_ids=ids, trained=trained)])
    return pack([row]).to(embedding.device)
