"""Layers that carry a state from token to token, in a pack: Mamba, gated delta nets, short convolutions.

Attention keeps packed sequences apart by itself (`kernels.attention`); such a layer would hand the state of one on to
the next. Where its kernels take the bounds of sequences (`cu_seq_lens_q`, `seq_idx`: flash-linear-attention,
causal-conv1d), they get them. Elsewhere the layer runs sequence by sequence, a shared prefix before each, and the rest
of the model stays packed.

    install(model)                      # each such layer stays the model's own; only its class becomes a subclass
    use_kernels(model, True)            # hand the bounds on; the caller compares the result with the plain one

Which layers they are is told by a depthwise convolution of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lmtune.batching.packing import SegmentLayout
from lmtune.kernels.label_only_layer import at_positions

KERNELS = "flash-linear-attention causal-conv1d"


def recurrent_layers(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The layers of `model` that carry a state."""
    for module in model.modules():
        convolutions = (child for child in module.children() if isinstance(child, torch.nn.Conv1d))
        if any(child.groups == child.in_channels > 1 for child in convolutions):
            yield module


def install(model: torch.nn.Module) -> bool:
    """Prepare the layers to run sequence by sequence, if the model hands `segments` on to them; False without any."""
    layers: list[Any] = list(recurrent_layers(model))
    for layer in layers:
        if not type(layer).__name__.startswith("Segmented"):
            layer.__class__ = _segmented_class(type(layer))
    use_kernels(model, False)
    return bool(layers)


def use_kernels(model: torch.nn.Module, enabled: bool) -> None:
    """Whether the prepared layers hand the bounds of sequences on to their kernels, where no prefix is shared."""
    for layer in recurrent_layers(model):
        object.__setattr__(layer, "lmtune_kernels", enabled)


def runs_by_sequence(model: torch.nn.Module) -> bool:
    """Whether a prepared layer of `model` runs sequence by sequence."""
    return any(not getattr(layer, "lmtune_kernels", True) for layer in recurrent_layers(model))


def _segmented_class(kind: type[Any]) -> type[Any]:
    """A subclass of a layer's class that keeps the sequences of a pack apart."""

    def forward(self: Any, *args: Any, segments: SegmentLayout | None = None, **kwargs: Any) -> Any:
        if segments is None or len(segments.lengths) == 1:
            return kind.forward(self, *args, **kwargs)
        device = next(self.parameters()).device
        if self.lmtune_kernels and segments.is_plain:
            return kind.forward(self, *args, **kwargs, **_bounds(segments, device))
        total, parts = sum(segments.lengths), []
        places = [torch.arange(s, s + n, device=device) for s, n in zip(segments.starts, segments.lengths, strict=True)]
        for own, prefix in zip(places, segments.prefixes, strict=True):
            whole = own if prefix is None else torch.cat([places[prefix], own])
            some_args, some_kwargs = (at_positions(part, whole, total) for part in (args, kwargs))
            output = kind.forward(self, *some_args, **some_kwargs)
            parts.append(output[:, -len(own) :])
        return torch.cat(parts, 1)

    return type(f"Segmented{kind.__name__}", (kind,), {"forward": forward})


def _bounds(segments: SegmentLayout, device: torch.device) -> dict[str, torch.Tensor]:
    """`cu_seq_lens_q[S + 1]` and `seq_idx[1, T]` of the S sequences of a pack."""
    lengths = torch.tensor(segments.lengths, dtype=torch.int32, device=device)
    edges = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    order = torch.arange(len(lengths), dtype=torch.int32, device=device)
    return {"cu_seq_lens_q": edges, "seq_idx": order.repeat_interleave(lengths)[None]}
