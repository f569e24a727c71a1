"""Two of llama.cpp's types of weights that the package gguf reads and does not write: Q4_K and Q6_K.

    quantize_q4_k(rows)      # float32 [N, 256 k] -> uint8 [N, 144 k]

Both hold blocks of 256 weights. Q4_K has eight groups of 32, each with a scale and a minimum of 6 bits: a weight is
`d * scale * q - dmin * minimum` with q of 4 bits. Q6_K has sixteen groups of 16 with a scale of 8 bits: `d * scale * q`
with q from -32 to 31. Of a few scales for each group the one with the least squared error is taken; larger weights
count more, as their errors do in products. Layout: ggml-common.h of https://github.com/ggml-org/ggml.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

BLOCK = 256
_TRIED = np.linspace(0.85, 1.1, 11, dtype=np.float32)  # of the scale that just reaches the largest weight


def quantize_q4_k(rows: Float32) -> Bytes:
    """float32 `[N, 256 k]` as bytes `[N, 144 k]`."""
    groups = rows.reshape(-1, 8, 32).astype(np.float32)
    scale, low = _range_scales(groups)
    d, dmin = (values.max(1, keepdims=True) / 63 for values in (scale, low))
    d, dmin = (values.astype(np.float16).astype(np.float32) for values in (d, dmin))
    scales, lows = (_rounded(values, unit, 0, 63) for values, unit in ((scale, d), (low, dmin)))
    step, offset = (d * scales)[:, :, None], (dmin * lows)[:, :, None]
    q = _rounded(groups + offset, step, 0, 15).astype(np.uint8)
    pairs = q.reshape(-1, 4, 2, 32)  # each 32 bytes hold two groups
    packed = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    s, m = scales.astype(np.uint8), lows.astype(np.uint8)
    head = [s[:, :4] | (s[:, 4:] >> 4) << 6, m[:, :4] | (m[:, 4:] >> 4) << 6, s[:, 4:] & 15 | (m[:, 4:] & 15) << 4]
    blocks = np.concatenate([_half(d), _half(dmin), *head, packed], axis=1)
    return blocks.reshape(rows.shape[0], -1)


def quantize_q6_k(rows: Float32) -> Bytes:
    """float32 `[N, 256 k]` as bytes `[N, 210 k]`."""
    groups = rows.reshape(-1, 16, 16).astype(np.float32)
    scale = _symmetric_scales(groups)
    largest = np.take_along_axis(scale, np.abs(scale).argmax(1)[:, None], 1)
    d = (largest / -128).astype(np.float16).astype(np.float32)
    scales = _rounded(scale, d, -128, 127)
    q = (_rounded(groups, (d * scales)[:, :, None], -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = np.stack([q[:, :, 0] & 15 | (q[:, :, 2] & 15) << 4, q[:, :, 1] & 15 | (q[:, :, 3] & 15) << 4], axis=2)
    high = q[:, :, 0] >> 4 | (q[:, :, 1] >> 4) << 2 | (q[:, :, 2] >> 4) << 4 | (q[:, :, 3] >> 4) << 6
    parts = [low.reshape(-1, 128), high.reshape(-1, 64), scales.astype(np.int8).view(np.uint8), _half(d)]
    return np.concatenate(parts, axis=1).reshape(rows.shape[0], -1)


def _range_scales(groups: Float32) -> tuple[Float32, Float32]:
    """Of `[B, G, n]` the scale and the negated minimum `[B, G]` of each group for 16 values from the minimum up."""
    low = np.minimum(groups.min(2), 0)
    reach = (groups.max(2) - low) / 15
    weight = groups**2 + (groups**2).mean(2, keepdims=True)
    best = reach.copy(), -low
    error = np.full(low.shape, np.inf, dtype=np.float32)
    for share in _TRIED:
        q = _rounded(groups - low[:, :, None], (reach * share)[:, :, None], 0, 15)
        scale, minimum = _fitted(groups, q, weight)
        found = (weight * (scale[:, :, None] * q - minimum[:, :, None] - groups) ** 2).sum(2)
        better = (found < error) & (scale > 0)
        error = np.where(better, found, error)
        best = np.where(better, scale, best[0]), np.where(better, minimum, best[1])
    return best


def _fitted(groups: Float32, q: Float32, weight: Float32) -> tuple[Float32, Float32]:
    """The scale, and the minimum from 0 up, with the least weighted error of `scale * q - minimum`."""
    w, x, y, xx, xy = (np.sum(weight * values, axis=2) for values in (1, q, groups, q * q, q * groups))
    spread = w * xx - x * x
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = (w * xy - x * y) / spread
        minimum = (x * xy - xx * y) / spread
        alone = xy / xx
    scale = np.where(minimum < 0, alone, scale)
    usable = np.isfinite(scale) & (spread > 0)
    return np.where(usable, scale, 0), np.where(usable, np.maximum(minimum, 0), 0)


def _symmetric_scales(groups: Float32) -> Float32:
    """Of `[B, G, n]` the scale `[B, G]` of each group for values from -32 to 31; it has either sign."""
    peak = np.take_along_axis(groups, np.abs(groups).argmax(2)[:, :, None], 2)[:, :, 0]
    best, error = peak / -32, np.full(peak.shape, np.inf, dtype=np.float32)
    weight = groups**2
    for share in _TRIED:
        q = _rounded(groups, (peak * share / -32)[:, :, None], -32, 31)
        xx = (weight * q * q).sum(2)
        scale = np.divide((weight * q * groups).sum(2), xx, out=np.zeros_like(xx), where=xx > 0)
        found = (weight * (scale[:, :, None] * q - groups) ** 2).sum(2)
        better = found < error
        error, best = np.where(better, found, error), np.where(better, scale, best)
    return best.astype(np.float32)


def _rounded(values: Float32, unit: Float32, least: int, most: int) -> Float32:
    """`values / unit` as integers in bounds; 0 where the unit is."""
    divided = np.divide(
        values, unit, out=np.zeros(np.broadcast_shapes(values.shape, unit.shape), np.float32), where=unit != 0
    )
    return np.clip(np.rint(divided), least, most)


def _half(values: Float32) -> Bytes:
    """`[B, 1]` as two bytes each."""
    return values.astype("<f2").view(np.uint8)
