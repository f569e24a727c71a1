"""Triton kernels for what lies between the matrix products: rotary embedding, gated activation, cross-entropy.

Each computes in fp32 and rounds its result once. The first two read their operands once, where PyTorch needs five and
two passes for their forward passes, and more for the backward ones; cross-entropy reads the logits twice. Imported only
where Triton is (PyTorch brings it on Linux with CUDA).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024  # elements of a program
_VOCABULARY_BLOCK = 8192


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
def _swiglu_forward(gate, up, y, width, gate_row, up_row, y_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    g = tl.load(gate + row * gate_row + at, mask, 0.0).to(tl.float32)
    u = tl.load(up + row * up_row + at, mask, 0.0).to(tl.float32)
    tl.store(y + row * y_row + at, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask)


@triton.jit
def _swiglu_backward(
    gate, up, dy, d_gate, d_up, width, gate_row, up_row, dy_row, d_gate_row, d_up_row, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    g = tl.load(gate + row * gate_row + at, mask, 0.0).to(tl.float32)
    u = tl.load(up + row * up_row + at, mask, 0.0).to(tl.float32)
    d = tl.load(dy + row * dy_row + at, mask, 0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(d_up + row * d_up_row + at, (d * g * s).to(d_up.dtype.element_ty), mask)
    tl.store(d_gate + row * d_gate_row + at, (d * u * s * (1 + g * (1 - s))).to(d_gate.dtype.element_ty), mask)


@triton.jit
def _label_logprob(logits, targets, logprobs, is_top1, width, row_stride, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * row_stride
    target = tl.load(targets + row)
    most = tl.full((), float("-inf"), tl.float32)
    top1 = tl.full((), 0, tl.int32)
    total = tl.full((), 0.0, tl.float32)
    for first in range(0, width, BLOCK):
        at = first + tl.arange(0, BLOCK)
        z = tl.load(start + at, at < width, float("-inf")).to(tl.float32)
        higher = tl.maximum(most, tl.max(z, 0))
        top1 = tl.where(higher > most, first + tl.argmax(z, 0), top1)  # the first of equal ones
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(z - higher), 0)
        most = higher
    of_target = tl.load(start + target).to(tl.float32)
    logprob = of_target - most - tl.log(total)
    tl.store(logprobs + row, logprob)
    tl.store(is_top1 + row, top1 == target)
    if GRADIENT:
        series = logprob * (1 + logprob * (0.5 + logprob / 6))  # exp(logprob) - 1, where that is near 0
        less_one = tl.where(logprob > -0.01, series, tl.exp(logprob) - 1)
        for first in range(0, width, BLOCK):
            at = first + tl.arange(0, BLOCK)
            z = tl.load(start + at, at < width, float("-inf")).to(tl.float32)
            p = tl.exp(z - most) / total
            p = tl.where(at == target, less_one, p)
            tl.store(start + at, p.to(logits.dtype.element_ty), at < width)


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


def swiglu(gate: torch.Tensor, up: torch.Tensor, y: torch.Tensor) -> None:
    """Write `silu(gate) * up` into y; matrices `[T, I]` whose rows may lie apart."""
    grid = len(gate), triton.cdiv(gate.shape[1], _BLOCK)
    _swiglu_forward[grid](gate, up, y, gate.shape[1], gate.stride(0), up.stride(0), y.stride(0), BLOCK=_BLOCK)


def swiglu_gradients(
    gate: torch.Tensor, up: torch.Tensor, dy: torch.Tensor, d_gate: torch.Tensor, d_up: torch.Tensor
) -> None:
    """Write the gradients of `swiglu` by `gate` and by `up` into `d_gate` and `d_up`."""
    rows = [tensor.stride(0) for tensor in (gate, up, dy, d_gate, d_up)]
    grid = len(gate), triton.cdiv(gate.shape[1], _BLOCK)
    _swiglu_backward[grid](gate, up, dy, d_gate, d_up, gate.shape[1], *rows, BLOCK=_BLOCK)


def label_logprobs_(
    logits: torch.Tensor, targets: torch.Tensor, logprobs: torch.Tensor, is_top1: torch.Tensor, gradient: bool
) -> None:
    """Write what `logits[n, V]` say of `targets[n]` into `logprobs[n]` and `is_top1[n]`.

    With `gradient`, the logits are overwritten with the gradient of minus the log-probabilities' sum.
    """
    _label_logprob[(len(logits),)](
        logits, targets, logprobs, is_top1, logits.shape[1], logits.stride(0), GRADIENT=gradient,
        BLOCK=_VOCABULARY_BLOCK, num_warps=16,
    )  # fmt: skip
