"""RMSNorm as one operation with fp32 statistics: `y = w ⊙ x / rms(x)`, rounded once.

transformers runs it as seven operations on whole tensors, each with a result of its own, most of them in fp32. On a GPU
PyTorch has one kernel for all. On a CPU a few rows at a time pass through them while they are in the processor's cache.
Only x and `1 / rms` are kept for the backward pass. In 16 bit the values are not rounded before they meet the weight.

    fuse_norms(model)       # each layer that computes this takes the fast path

RMSNorm: https://arxiv.org/abs/1910.07467.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F

_CHUNK_ELEMENTS = 2**18  # on a CPU: 1 MiB in fp32, which fits into a core's cache
_TOLERANCE = 1e-5  # of the largest result


class _RmsNorm(torch.autograd.Function):
    """`x[T, D]`, `scale[D]` fp32, what is added to the mean square."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
        y, inverse = torch.empty_like(x), torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
        for part in _chunks(x):
            wide = x[part].float()
            inverse[part] = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
            y[part] = (wide * inverse[part]).mul_(scale)
        ctx.save_for_backward(x, scale, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g,) = grads
        x, scale, inverse = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        d_scale = torch.zeros_like(scale) if ctx.needs_input_grad[1] else None
        for part in _chunks(x):
            normal, wide = x[part].float() * inverse[part], g[part].float()
            if d_scale is not None:
                d_scale += (wide * normal).sum(0)
            if dx is not None:
                scaled = wide * scale
                along = (scaled * normal).mean(-1, keepdim=True)
                dx[part] = scaled.addcmul_(normal, along, value=-1).mul_(inverse[part])
        return dx, d_scale, None


def fuse_norms(model: torch.nn.Module) -> list[str]:
    """Give every RMSNorm of `model` the fused path, by its class; returns the names of those that have it.

    Which they are is found by trying: modules with one weight `[D]` and an epsilon whose own result this is, with that
    weight or one more than it, as in Gemma.
    """
    fused = []
    for name, module in model.named_modules():
        offset = _offset(module)
        if offset is not None:
            module.lmtune_offset = offset
            module.__class__ = _fused_class(type(module))
            fused.append(name)
    return fused


@torch.no_grad()
def _offset(module: Any) -> float | None:
    """What is added to the weight, or None where the module is no RMSNorm."""
    weight, eps = getattr(module, "weight", None), _epsilon(module)
    is_candidate = "RMSNorm" in type(module).__name__ and not type(module).__name__.startswith("Fused")
    if not is_candidate or eps is None or weight is None or weight.dim() != 1 or len(list(module.parameters())) != 1:
        return None
    if len(inspect.signature(module.forward).parameters) != 1:  # a gate, which is multiplied to the result
        return None
    probe = torch.linspace(-2, 3, 3 * len(weight), device=weight.device).view(3, -1).contiguous()
    kept = weight.data
    weight.data = kept.float()
    try:
        wanted = module(probe)
    finally:
        weight.data = kept
    for offset in (0.0, 1.0):
        found = _RmsNorm.apply(probe, kept.float() + offset, eps)  # type: ignore[no-untyped-call]
        if (found - wanted).abs().max() <= _TOLERANCE * wanted.abs().max():
            return offset
    return None


def _epsilon(module: Any) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


def _fused_class(kind: type[Any]) -> type[Any]:
    """A subclass of a norm's class with the fused path."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cuda" and not self.lmtune_offset and x.dtype == self.weight.dtype:
            return F.rms_norm(x, (x.shape[-1],), self.weight, _epsilon(self)).to(x.dtype)  # autocast wants fp32
        scale = self.weight.float() + self.lmtune_offset
        flat = x.reshape(-1, x.shape[-1])
        normal: torch.Tensor = _RmsNorm.apply(flat, scale, _epsilon(self))  # type: ignore[no-untyped-call]
        return normal.view(x.shape)

    return type(f"Fused{kind.__name__}", (kind,), {"forward": forward})


def _chunks(x: torch.Tensor) -> list[slice]:
    """Rows that are worked on at once."""
    rows = max(1, _CHUNK_ELEMENTS // x.shape[-1]) if x.device.type == "cpu" else max(1, len(x))
    return [slice(start, start + rows) for start in range(0, len(x), rows)]
