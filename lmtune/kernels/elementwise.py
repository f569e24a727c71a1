"""The rotary embedding and the gated activation as one GPU kernel each, where the model's own code gives the same.

    fuse_elementwise(model)       # on a GPU with Triton; elsewhere nothing

transformers makes of each several passes over whole tensors. Which layers compute these functions is found by trying.
The rotary embedding is a function in the module of a model's code, which is replaced there for every model of its kind;
a gated MLP gets a subclass with another forward, as its object stays the model's own.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from lmtune.kernels.gated_mlp import grouped_mlp, swiglu, swiglu_gradients

_ROTARY = "apply_rotary_pos_emb"
_TOLERANCE = 2e-2  # of the largest result, in 16 bit
Rotary = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def fuse_elementwise(model: PreTrainedModel) -> None:
    """Give `model` the fused kernels where it is on a GPU in 16 bit, Triton is installed, and they give its results."""
    device, dtype = next(model.parameters()).device, model.dtype
    if device.type != "cuda" or dtype.itemsize != 2 or importlib.util.find_spec("triton") is None:
        return
    for module in list(model.modules()):
        own = sys.modules.get(type(module).__module__)
        rotary = getattr(own, _ROTARY, None)
        if rotary is not None and not hasattr(rotary, "lmtune_original") and _is_rotary(rotary, device):
            setattr(own, _ROTARY, _with_kernel(rotary))
        if _is_gated(module, device, dtype) and not type(module).__name__.startswith("Fused"):
            module.__class__ = _fused_class(type(module))


class _Rotary(torch.autograd.Function):
    """`x[B, heads, T, d]`, `cos` and `sin` `[B or 1, T, d]`, which have no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        from lmtune.kernels.triton_kernels import rotate

        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        from lmtune.kernels.triton_kernels import rotate

        cos, sin = ctx.saved_tensors
        return rotate(grads[0], cos, sin, backward=True), None, None


class _Swiglu(torch.autograd.Function):
    """`silu(gate) * up`."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        swiglu(*(tensor.flatten(0, -2) for tensor in (gate, up, y)))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        swiglu_gradients(*(tensor.flatten(0, -2) for tensor in (gate, up, grads[0].contiguous(), d_gate, d_up)))
        return d_gate, d_up


def _with_kernel(original: Rotary) -> Rotary:
    """`original` with the kernel for what it was made for: 16 bit on a GPU."""

    @functools.wraps(original)
    def rotary(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any, **settings: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        is_plain = not rest and not settings and q.dim() == 4 and cos.dim() == 3 and cos.shape[-1] == q.shape[-1]
        if not is_plain or q.device.type != "cuda" or q.dtype.itemsize != 2 or cos.requires_grad:
            return original(q, k, cos, sin, *rest, **settings)
        turned_q = _Rotary.apply(q, cos, sin)  # type: ignore[no-untyped-call]
        turned_k = _Rotary.apply(k, cos, sin)  # type: ignore[no-untyped-call]
        return turned_q, turned_k

    rotary.lmtune_original = original  # type: ignore[attr-defined]
    return rotary


def _is_rotary(rotary: Rotary, device: torch.device) -> bool:
    """Whether a function turns halves of each head, as Llama's does."""
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 4, 5, 32), (1, 2, 5, 32), (1, 5, 32), (1, 5, 32)
    drawn = (torch.randn(shape, generator=generator, device="cpu") for shape in shapes)
    return _agree(rotary, _with_kernel(rotary), *(tensor.to(device, torch.bfloat16) for tensor in drawn))


def _is_gated(module: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a module is an MLP `down(silu(gate(x)) * up(x))` of linear layers."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(hasattr(part, "in_features") for part in parts) or not hasattr(module, "act_fn"):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((1, 3, module.gate_proj.in_features), generator=generator, device="cpu").to(device, dtype)
    return _agree(type(module).forward, _gated, module, x)


def _gated(module: Any, x: torch.Tensor) -> torch.Tensor:
    grouped = grouped_mlp(module.gate_proj, module.up_proj, module.down_proj, x)
    if grouped is not None:
        return grouped
    product = _Swiglu.apply(module.gate_proj(x), module.up_proj(x))  # type: ignore[no-untyped-call]
    result: torch.Tensor = module.down_proj(product)
    return result


def _fused_class(kind: type[Any]) -> type[Any]:
    """A subclass of an MLP's class with the fused activation."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if x.dtype.itemsize != 2 or x.device.type != "cuda":
            result: torch.Tensor = kind.forward(self, x)
            return result
        return _gated(self, x)

    return type(f"Fused{kind.__name__}", (kind,), {"forward": forward})


@torch.no_grad()
def _agree(one: Callable[..., Any], other: Callable[..., Any], *arguments: Any) -> bool:
    """Whether two functions give the same results; False where one fails."""
    try:
        wanted, found = one(*arguments), other(*arguments)
    except Exception:  # whatever a model's code, or a kernel's compiler, raises
        return False
    pairs = zip(wanted, found, strict=True) if isinstance(wanted, tuple) else [(wanted, found)]
    return all(
        a.shape == b.shape and float((a.float() - b.float()).abs().max()) <= _TOLERANCE * float(a.float().abs().max())
        for a, b in pairs
    )
