"""Log-probabilities of the targets, without ever holding the logits of a whole batch.

    logprob_i = z_i,target - log sum_v exp(z_iv)      with z = hidden @ head.T, scaled and soft-capped as the model does

The logits of a chunk of rows are made, reduced to the chunk's log-probabilities and at once to the gradient of its
hidden states, and dropped: the backward pass only multiplies by the incoming gradient. Memory is one chunk's logits
instead of several copies of all. The idea of taking the gradient in the forward pass is Liger Kernel's
(https://arxiv.org/abs/2410.10989); here each log-probability is differentiable by itself, as objectives over sums of
them need it, and `is_top1` says whether the target is the most likely token.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch

_CPU_CHUNK_ELEMENTS, _CPU_CHUNK_ROWS = 8 * 2**20, 128  # fewer rows make slower products, more only hold more memory
_GPU_CHUNK_ROWS = 2048


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its logits after the head: `z * scale`, then `softcap * tanh(z / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """The transformed logits; out of place."""
        logits = logits * self.scale if self.scale != 1.0 else logits
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """What the model's config names: `final_logit_softcapping`, `logit_scale` or `logits_scaling`, if any."""
        scale = getattr(config, "logit_scale", None)
        divisor = getattr(config, "logits_scaling", None)
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(float(scale or 1.0) / float(divisor or 1.0), None if softcap is None else float(softcap))


def label_logprobs(
    hidden: torch.Tensor,
    head: torch.Tensor,
    target_ids: torch.Tensor,
    transform: LogitTransform | None = None,
    rows_at_once: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of N targets, each differentiable by itself.

    Rows are independent, so the gradient of each is taken with a weight of 1 in the forward pass, and the backward pass
    multiplies it with what comes in: a weighted loss, or a loss of sums over sequences, needs no more memory than their
    plain sum. Only a head that is trained is multiplied again.

    Args:
        hidden: `[N, D]`, the last hidden state at the positions that predict them; taken in the head's type, which
            it does not have where autocast leaves the last norm in fp32.
        head: `[V, D]`, the output head's weight; may require a gradient.
        target_ids: `[N]`.
        transform: what the model does to its logits.
        rows_at_once: rows of logits held at a time; by default `chunk_rows`.

    Returns:
        `logprobs[N]` in fp32, in nats, with a gradient, and `is_top1[N]`, whether the target is the most likely token.
    """
    rows = rows_at_once or chunk_rows(hidden.device.type, len(head))
    logprobs, is_top1 = _LabelLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden.to(head.dtype), head, target_ids, transform or LogitTransform(), rows, torch.is_grad_enabled()
    )
    return logprobs, is_top1


def chunk_rows(device_type: str, vocabulary: int) -> int:
    """How many rows of logits are held at a time."""
    if device_type == "cuda":
        return _GPU_CHUNK_ROWS
    return max(_CPU_CHUNK_ROWS, _CPU_CHUNK_ELEMENTS // vocabulary)


class _LabelLogprobs(torch.autograd.Function):
    """`label_logprobs` with its gradient taken in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, target_ids: torch.Tensor,
        transform: LogitTransform, rows: int, grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        is_top1 = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if grad and ctx.needs_input_grad[0] else None
        for part in _chunks(len(hidden), rows):
            raw = hidden[part] @ head.t()  # [rows, V]
            logprobs[part], is_top1[part], d_raw = _chunk(raw, target_ids[part], transform, d_hidden is not None)
            if d_raw is not None and d_hidden is not None:
                torch.mm(d_raw.to(hidden.dtype), head, out=d_hidden[part])
        if d_hidden is not None:
            d_hidden.neg_()
        ctx.save_for_backward(d_hidden, *((hidden, head, target_ids) if grad and ctx.needs_input_grad[1] else ()))
        ctx.transform, ctx.rows = transform, rows
        ctx.mark_non_differentiable(is_top1)
        return logprobs, is_top1

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_hidden, *of_head = ctx.saved_tensors
        d_logprobs = grads[0][:, None]  # [N, 1]
        d_head = None
        if of_head:
            hidden, head, target_ids = of_head
            d_head = _head_gradient(hidden, head, target_ids, d_logprobs, ctx.transform, ctx.rows)
        scaled = None if d_hidden is None else (d_hidden * d_logprobs).to(d_hidden.dtype)
        return scaled, d_head, None, None, None, None


def _head_gradient(
    hidden: torch.Tensor, head: torch.Tensor, target_ids: torch.Tensor, d_logprobs: torch.Tensor,
    transform: LogitTransform, rows: int,
) -> torch.Tensor:  # fmt: skip
    """`[V, D]`: the gradient of a head that is trained, whose logits are made again."""
    d_head = torch.zeros_like(head, dtype=torch.float32)
    for part in _chunks(len(hidden), rows):
        _, _, d_raw = _chunk(hidden[part] @ head.t(), target_ids[part], transform, True)
        assert d_raw is not None
        d_head -= (d_raw * d_logprobs[part]).to(hidden.dtype).t() @ hidden[part]
    return d_head.to(head.dtype)


def _chunks(count: int, most: int) -> list[slice]:
    """`count` rows in as few parts of at most `most` as possible, of about the same size: a short one is slow."""
    parts = math.ceil(count / most)
    edges = [count * part // parts for part in range(parts + 1)] if parts else []
    return [slice(start, end) for start, end in itertools.pairwise(edges)]


def _chunk(
    raw: torch.Tensor, targets: torch.Tensor, transform: LogitTransform, grad: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Log-probabilities `[n]`, top-1 `[n]`, and with `grad` the gradient `[n, V]` of minus their sum by the raw logits.

    The statistics are in fp32, and the passes over the logits few. `raw` is overwritten.
    """
    if transform == LogitTransform() and _has_kernel(raw):
        from lmtune.kernels.triton_kernels import label_logprobs_

        found = torch.empty(len(raw), device=raw.device), torch.empty(len(raw), dtype=torch.bool, device=raw.device)
        label_logprobs_(raw, targets, *found, gradient=grad)
        return *found, raw if grad else None
    logits, target = transform.apply(raw), targets[:, None]
    keep = None if transform.softcap is None or not grad else (logits / transform.softcap).float()  # tanh(z / softcap)
    wide = logits.float()
    most, top1 = wide.max(1, keepdim=True)
    of_target = wide.gather(1, target).sub_(most)
    probabilities = wide.sub_(most).exp_()  # in place: the logits themselves are not needed any more
    total = probabilities.sum(1, keepdim=True)
    of_target.sub_(total.log())
    logprobs, is_top1 = of_target[:, 0], (top1 == target)[:, 0]
    if not grad:
        return logprobs, is_top1, None
    gradient = torch.div(probabilities, total, out=raw if logits is raw else probabilities)
    gradient.scatter_(1, target, of_target.expm1().to(gradient.dtype))  # p - 1, where that is near 0 too
    if keep is not None:
        gradient.mul_(1 - keep.square_())  # the derivative of softcap * tanh(z / softcap)
    if transform.scale != 1.0:
        gradient.mul_(transform.scale)
    return logprobs, is_top1, gradient


def _has_kernel(raw: torch.Tensor) -> bool:
    return raw.device.type == "cuda" and raw.dtype.itemsize == 2 and importlib.util.find_spec("triton") is not None
