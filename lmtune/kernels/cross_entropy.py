"""Cross-entropy where a token is trained, without ever holding the logits of a whole batch.

    loss_i = log sum_v exp(z_iv) - z_i,target      with z = hidden @ head.T, scaled and soft-capped as the model does

The logits of a chunk of rows are made, turned into the chunk's losses and at once into the gradient of its hidden
states, and dropped: the backward pass has nothing left to do but to multiply by the incoming gradient. Memory is one
chunk's logits instead of several copies of all. The idea of taking the gradient in the forward pass is Liger Kernel's
(https://arxiv.org/abs/2410.10989); this one also reports each token's loss and whether it was the first choice.
"""

from __future__ import annotations

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


def label_cross_entropy(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    transform: LogitTransform | None = None,
    rows_at_once: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of the losses of N trained tokens.

    A step divides its gradients by its number of tokens at the end, in fp32: in fp16 most of a token's gradient would
    vanish if that were done here.

    Args:
        hidden: `[N, D]`, the last hidden state at the positions that predict them; taken in the head's type, which
            it does not have where autocast leaves the last norm in fp32.
        head: `[V, D]`, the output head's weight; may require a gradient.
        targets: `[N]`.
        transform: what the model does to its logits.
        rows_at_once: rows of logits held at a time; by default `chunk_rows`.

    Returns:
        The sum (a scalar that carries the gradient), `losses[N]` in fp32 and `correct[N]`, both without one.
    """
    rows = rows_at_once or chunk_rows(hidden.device.type, len(head))
    total, losses, correct = _LabelCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden.to(head.dtype), head, targets, transform or LogitTransform(), rows, torch.is_grad_enabled()
    )
    return total, losses, correct


def chunk_rows(device_type: str, vocabulary: int) -> int:
    """How many rows of logits are held at a time."""
    if device_type == "cuda":
        return _GPU_CHUNK_ROWS
    return max(_CPU_CHUNK_ROWS, _CPU_CHUNK_ELEMENTS // vocabulary)


class _LabelCrossEntropy(torch.autograd.Function):
    """`label_cross_entropy` with its gradient taken in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor,
        transform: LogitTransform, rows: int, grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        correct = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        head_grad = grad and ctx.needs_input_grad[1]
        wanted = grad and any(ctx.needs_input_grad[:2])  # not where a model is only scored
        d_hidden = torch.empty_like(hidden) if wanted else None
        d_head = torch.zeros_like(head, dtype=torch.float32) if head_grad else None
        for part in _chunks(len(hidden), rows):
            raw = hidden[part] @ head.t()  # [rows, V]
            losses[part], correct[part], d_raw = _chunk(raw, targets[part], transform, wanted)
            if d_raw is None or d_hidden is None:
                continue
            d_raw = d_raw.to(hidden.dtype)
            torch.mm(d_raw, head, out=d_hidden[part])
            if d_head is not None:
                d_head += d_raw.t() @ hidden[part]
        ctx.save_for_backward(d_hidden, d_head)
        ctx.mark_non_differentiable(losses, correct)
        return losses.sum(), losses, correct

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_hidden, d_head = ctx.saved_tensors
        d_head = None if d_head is None else d_head * grads[0]
        return d_hidden * grads[0], d_head, None, None, None, None


def _chunks(count: int, most: int) -> list[slice]:
    """`count` rows in as few parts of at most `most` as possible, of about the same size: a short one is slow."""
    parts = math.ceil(count / most)
    edges = [count * part // parts for part in range(parts + 1)] if parts else []
    return [slice(start, end) for start, end in itertools.pairwise(edges)]


def _chunk(
    raw: torch.Tensor, targets: torch.Tensor, transform: LogitTransform, grad: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Losses `[n]`, first choice right `[n]`, and with `grad` the gradient `[n, V]` of their sum by the raw logits."""
    logits = transform.apply(raw).float()
    target = targets[:, None]
    most, choice = logits.max(1, keepdim=True)
    wanted = logits.gather(1, target)
    keep = None if transform.softcap is None or not grad else logits / transform.softcap  # tanh(z / softcap)
    probabilities = logits.sub_(most).exp_()  # in place: the logits themselves are not needed any more
    total = probabilities.sum(1, keepdim=True)
    losses = (total.log() + most - wanted)[:, 0]
    if not grad:
        return losses, (choice == target)[:, 0], None
    gradient = probabilities.div_(total)
    gradient.scatter_add_(1, target, torch.full_like(wanted, -1.0))
    if keep is not None:
        gradient.mul_(1 - keep.square_())  # the derivative of softcap * tanh(z / softcap)
    if transform.scale != 1.0:
        gradient.mul_(transform.scale)
    return losses, (choice == target)[:, 0], gradient
