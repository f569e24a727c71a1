"""Triton kernels for what lies between the matrix products: the rotary embedding and the gated activation.

Each reads its operands once, computes in fp32 and rounds its result once. PyTorch needs five and two passes for their
forward passes, and more for the backward ones. Imported only where Triton is (PyTorch brings it on Linux with CUDA).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024  # elements of a program


@triton.jit
def _rotate(
    x, y, cos, sin, heads, x_batch, x_head, x_token, y_batch, y_head, y_token, c_batch, c_token,
    HALF: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    token, batch = tl.program_id(0), tl.program_id(2)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, WIDTH)[None, :]
    mask = (head < heads) & (at < HALF)
    angle = batch * c_batch + token * c_token + at
    cos1 = tl.load(cos + angle, at < HALF, 0.0).to(tl.float32)
    cos2 = tl.load(cos + angle + HALF, at < HALF, 0.0).to(tl.float32)
    sin1 = tl.load(sin + angle, at < HALF, 0.0).to(tl.float32)
    sin2 = tl.load(sin + angle + HALF, at < HALF, 0.0).to(tl.float32)
    place = batch * x_batch + head * x_head + token * x_token + at
    x1 = tl.load(x + place, mask, 0.0).to(tl.float32)
    x2 = tl.load(x + place + HALF, mask, 0.0).to(tl.float32)
    if BACKWARD:
        y1 = x1 * cos1 + x2 * sin2
        y2 = x2 * cos2 - x1 * sin1
    else:
        y1 = x1 * cos1 - x2 * sin1
        y2 = x2 * cos2 + x1 * sin2
    place = batch * y_batch + head * y_head + token * y_token + at
    tl.store(y + place, y1.to(y.dtype.element_ty), mask)
    tl.store(y + place + HALF, y2.to(y.dtype.element_ty), mask)


@triton.jit
def _swiglu_forward(gate, up, y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    g = tl.load(gate + at, mask, 0.0).to(tl.float32)
    u = tl.load(up + at, mask, 0.0).to(tl.float32)
    tl.store(y + at, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask)


@triton.jit
def _swiglu_backward(gate, up, dy, d_gate, d_up, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    g = tl.load(gate + at, mask, 0.0).to(tl.float32)
    u = tl.load(up + at, mask, 0.0).to(tl.float32)
    d = tl.load(dy + at, mask, 0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(d_up + at, (d * g * s).to(d_up.dtype.element_ty), mask)
    tl.store(d_gate + at, (d * u * s * (1 + g * (1 - s))).to(d_gate.dtype.element_ty), mask)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool = False) -> torch.Tensor:
    """`x[B, heads, T, d]` rotated by `cos`, `sin` `[B or 1, T, d]`; with `backward` its gradient rotated back.

    The result has the strides of x where that is dense: what lies as `[B, T, heads, d]` stays so.
    """
    batch, heads, tokens, d = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    y, cos, sin = torch.empty_like(x), cos.contiguous(), sin.contiguous()
    width = triton.next_power_of_2(d // 2)
    at_once = min(triton.next_power_of_2(heads), max(1, _BLOCK // width))
    c_batch = cos.stride(0) if len(cos) > 1 else 0
    _rotate[(tokens, triton.cdiv(heads, at_once), batch)](
        x, y, cos, sin, heads, x.stride(0), x.stride(1), x.stride(2), y.stride(0), y.stride(1), y.stride(2),
        c_batch, cos.stride(1), HALF=d // 2, WIDTH=width, HEADS=at_once, BACKWARD=backward,
    )  # fmt: skip
    return y


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`, of contiguous tensors of one shape."""
    y = torch.empty_like(gate)
    _swiglu_forward[(triton.cdiv(gate.numel(), _BLOCK),)](gate, up, y, gate.numel(), BLOCK=_BLOCK)
    return y


def swiglu_gradients(gate: torch.Tensor, up: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `swiglu` by `gate` and by `up`."""
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    _swiglu_backward[(triton.cdiv(gate.numel(), _BLOCK),)](gate, up, dy, d_gate, d_up, gate.numel(), BLOCK=_BLOCK)
    return d_gate, d_up
