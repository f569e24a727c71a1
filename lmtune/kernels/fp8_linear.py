"""A frozen weight in 8-bit floating point: the two large products of a LoRA layer run on fp8 tensor cores.

    y = (x / s_x)₈ (W / s_w)₈ᵀ · s_x s_wᵀ        dx = (g / s_g)₈ (W / s_v)₈ · s_g s_v

Each row of activations and gradients, and each row (for y) or column (for dx) of W, is scaled by its largest value to
the range of e4m3 (4 bits of exponent, 3 of mantissa). The adapter and everything else stay in 16 and 32 bit. Not
exact: about two decimal digits a product, which training over a frozen base tolerates; hence it must be asked for.
Rowwise scaling: https://arxiv.org/abs/2209.05433 and PyTorch's `torch.nn.functional.scaled_mm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import ScalingType, scaled_mm

from lmtune.kernels.lora_linear import BaseWeight

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max
_MULTIPLE = 16  # what the tensor cores want of in and out


class Fp8Weight(BaseWeight):
    """The weight `W[out, in]` of a plain linear layer in fp8, once scaled by rows and once by columns."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        weight = layer.weight.detach()
        self._by_row = quantise_rows(weight)  # [out, in], [out, 1]
        self._by_column = quantise_rows(weight.t().contiguous())  # [in, out], [in, 1]

    def times(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x[T, in] Wᵀ + bias`."""
        product = _product(x, *self._by_row)
        return product if bias is None else product + bias

    def times_transposed(self, g: torch.Tensor) -> torch.Tensor:
        """`g[T, out] W`."""
        return _product(g, *self._by_column)


def fits_fp8(layer: Any) -> bool:
    """Whether the tensor cores take a weight of this layer's shape."""
    return type(layer) is torch.nn.Linear and not (layer.in_features % _MULTIPLE or layer.out_features % _MULTIPLE)


def why_not_fp8(device: torch.device) -> str | None:
    """None if `device` multiplies in fp8 by itself, else why not."""
    if device.type != "cuda":
        return "a CPU has no fp8 matrix product of its own"
    if torch.cuda.get_device_capability(device) < (8, 9):
        return f"{torch.cuda.get_device_name(device)} has no fp8 tensor cores"
    return None


def quantise_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`matrix[n, k]` in fp8 and the scales `[n, 1]` in fp32 by which its rows were divided."""
    scale = matrix.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / _LARGEST
    return (matrix.float() / scale).to(FP8), scale


def _product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`x[T, k] weight[n, k]ᵀ`, in `x`'s dtype."""
    rows, row_scale = quantise_rows(x)
    product = scaled_mm(
        rows, weight.t(), row_scale, ScalingType.RowWise, scale.t(), ScalingType.RowWise, output_dtype=torch.bfloat16
    )
    return product.to(x.dtype)
