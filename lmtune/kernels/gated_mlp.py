"""The gated MLP `down(silu(gate(x)) * up(x))` over LoRA layers that compute in groups, as one operation.

What the layers make of each other's results is written where the next product reads it, beside the room for the
low-rank part, so that nothing is copied together: on a GPU a tenth of such a layer's time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lmtune.kernels.lora_group import LoraGroup


def grouped_mlp(gate: Any, up: Any, down: Any, x: torch.Tensor) -> torch.Tensor | None:
    """The MLP's result for `x[…, in]`, or None where its layers are not in groups, or compute by themselves."""
    first, second = (getattr(layer, "lmtune_group", None) for layer in (gate, down))
    if first is None or second is None or first.layers != [gate, up] or second.layers != [down]:
        return None
    if any(layer.get_base_layer().bias is not None for layer in (gate, up, down)):
        return None
    of_first, of_second = first.adapters(x.dtype), second.adapters(x.dtype)
    if of_first is None or of_second is None:
        return None
    y: torch.Tensor = _GroupedMlp.apply(  # type: ignore[no-untyped-call]
        x.reshape(-1, x.shape[-1]), first, second, *of_first, *of_second
    )
    return y.view(*x.shape[:-1], -1)


class _GroupedMlp(torch.autograd.Function):
    """`x[T, in]`, the groups of gate and up and of down, and A, B of the three layers."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, first: LoraGroup, second: LoraGroup, *ab: torch.Tensor) -> torch.Tensor:
        wide = first.widen(x)
        both = wide @ first.weight.t()  # [T, 2 I]: gate and up
        inner = x.new_empty(len(x), second.inputs + second.rank)
        gate, up = both.chunk(2, 1)
        swiglu(gate, up, inner[:, : second.inputs])
        second.complete(inner)
        ctx.save_for_backward(wide, both, inner)
        ctx.groups = first, second
        return inner @ second.weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        wide, both, inner = ctx.saved_tensors
        first, second = ctx.groups
        d_inner, of_second = second.gradients(second.with_room(grads[0]), inner)
        d_both = both.new_empty(len(both), first.outputs + first.rank)
        (gate, up), (d_gate, d_up) = both.chunk(2, 1), d_both[:, : first.outputs].chunk(2, 1)
        swiglu_gradients(gate, up, d_inner, d_gate, d_up)
        dx, of_first = first.gradients(d_both, wide, ctx.needs_input_grad[0])
        return dx, None, None, *of_first, *of_second


def swiglu(gate: torch.Tensor, up: torch.Tensor, y: torch.Tensor) -> None:
    """Write `silu(gate) * up` of matrices `[T, I]` into y, rounded once."""
    if gate.device.type == "cuda":
        from lmtune.kernels.triton_kernels import swiglu as kernel

        kernel(gate, up, y)
    else:
        y.copy_(F.silu(gate.float()) * up.float())


def swiglu_gradients(
    gate: torch.Tensor, up: torch.Tensor, dy: torch.Tensor, d_gate: torch.Tensor, d_up: torch.Tensor
) -> None:
    """Write the gradients of `swiglu` by `gate` and by `up` into `d_gate` and `d_up`, all `[T, I]`."""
    if gate.device.type == "cuda":
        from lmtune.kernels.triton_kernels import swiglu_gradients as kernel

        kernel(gate, up, dy, d_gate, d_up)
    else:
        g, s, d = gate.float(), torch.sigmoid(gate.float()), dy.float()
        d_up.copy_(d * g * s)
        d_gate.copy_(d * up.float() * s * (1 + g * (1 - s)))
