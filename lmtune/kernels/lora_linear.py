"""A LoRA linear layer as one operation: y = x Wᵀ + s (x Aᵀ) Bᵀ, with a backward pass that keeps only what it needs.

PEFT's layer runs the low-rank product, the scaling and the sum as separate operations, each with its own result kept
for the backward pass, and writes `[T, out]` three times. Here the low-rank part is added into the base product in place
and only `x` and `x Aᵀ` are kept. Over a quantized base, W is dequantized inside the operation (or once, where
memory allows, with the same values).

    fuse(model)       # each LoRA layer that is plain enough takes the fast path; the others stay as they are

The layer stays PEFT's own object with PEFT's parameter names: only its class becomes a subclass with another forward,
so saving, merging and switching adapters work as before. LoRA: https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

from typing import Any

import torch

_ADAPTER = "default"


class _LoraLinear(torch.autograd.Function):
    """`x[T, in]`, `W[out, in]`, `A[r, in]`, `B[out, r]`, bias `[out]` or None, scaling s, dropout probability p."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, source: BaseWeight, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor,
        s: float, p: float,
    ) -> torch.Tensor:  # fmt: skip
        a, b = a.to(x.dtype), b.to(x.dtype)
        dropped, mask = torch.native_dropout(x, p, True) if p > 0 else (x, None)
        xa = dropped @ a.t()  # [T, r]
        y = source.times(x, bias)
        y.addmm_(xa, b.t(), alpha=s)
        ctx.save_for_backward(x, xa, a, b, mask)
        ctx.source, ctx.s, ctx.keep = source, s, 1 - p
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (g,) = grads
        x, xa, a, b, mask = ctx.saved_tensors
        gb = (g @ b).mul_(ctx.s)  # [T, r]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = ctx.source.times_transposed(g)
            if mask is None:
                dx.addmm_(gb, a)
            else:
                dx.add_((gb @ a).mul_(mask).div_(ctx.keep))
        dropped = x if mask is None else (x * mask).div_(ctx.keep)
        return dx, None, None, (gb.t() @ dropped).float(), (g.t() @ xa).mul_(ctx.s).float(), None, None


class BaseWeight:
    """The frozen weight `W[out, in]` of a base layer, in full precision, 4 or 8 bit, as a dense matrix.

    `keep` holds the dense matrix of a quantized weight instead of making it at each call; the values are the same.
    """

    def __init__(self, layer: Any, keep: bool = False) -> None:
        self.layer, self.keep = layer, keep and type(layer) is not torch.nn.Linear
        self._dense: torch.Tensor | None = None

    def times(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x[T, in] Wᵀ + bias`."""
        weight = self.dense(x.dtype)
        return torch.addmm(bias, x, weight.t()) if bias is not None else x @ weight.t()

    def times_transposed(self, g: torch.Tensor) -> torch.Tensor:
        """`g[T, out] W`."""
        return g @ self.dense(g.dtype)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight in `dtype`."""
        if self._dense is not None and self._dense.dtype == dtype:
            return self._dense
        weight = self._dequantized(dtype)
        if self.keep:
            self._dense = weight
        return weight

    def drop(self) -> None:
        """Let go of a kept dense matrix."""
        self._dense = None

    def _dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        weight = self.layer.weight
        if (state := getattr(weight, "quant_state", None)) is not None:
            from bitsandbytes.functional import dequantize_4bit

            dense: torch.Tensor = dequantize_4bit(weight.data, state)
            return dense.to(dtype)
        if weight.dtype == torch.int8:
            largest = weight.SCB if weight.SCB is not None else self.layer.state.SCB  # moved at the first forward
            exact: torch.Tensor = weight.data.to(dtype) * (largest / 127.0).to(dtype)[:, None]
            return exact
        plain: torch.Tensor = weight.detach()
        return plain.to(dtype)


def fuse(model: torch.nn.Module, keep_dense: bool = False) -> list[str]:
    """Give every plain LoRA layer of `model` the fused forward pass; returns the names of those left as they are.

    Plain is: one adapter without DoRA or a bias of its own, over a linear layer in full precision, 4 or 8 bit. In 8 bit
    this is the weights rounded and nothing else; bitsandbytes' own layer rounds activations too where it can.

    Args:
        model: a PeftModel.
        keep_dense: hold quantized weights as dense matrices, where memory allows.
    """
    from peft.tuners.lora import LoraLayer

    left = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or type(module).__name__.startswith("Fused"):
            continue
        if _is_plain(module):
            module.lmtune_weight = BaseWeight(module.get_base_layer(), keep_dense)
            module.__class__ = _fused_class(type(module))
        else:
            left.append(name)
    return left


def drop_dense(model: Any) -> bool:
    """Let go of all dense matrices beside quantized weights, and make them at each call from now on.

    Returns:
        Whether there were any to be held. The values stay the same.
    """
    weights = (getattr(module, "lmtune_weight", None) for module in model.modules())
    held = [weight for weight in weights if isinstance(weight, BaseWeight) and weight.keep]
    for weight in held:
        weight.keep = False
        weight.drop()
    return bool(held)


def _fused_class(kind: type[Any]) -> type[Any]:
    """A subclass of PEFT's layer class with the fused forward pass."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters or self.merged or args or kwargs or self.active_adapters != [_ADAPTER]:
            output: torch.Tensor = kind.forward(self, x, *args, **kwargs)
            return output
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        flat = x.reshape(-1, x.shape[-1])  # [T, in]
        base = self.get_base_layer()
        a, b = self.lora_A[_ADAPTER].weight, self.lora_B[_ADAPTER].weight
        result: torch.Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
            flat, self.lmtune_weight, base.bias, a, b, self.scaling[_ADAPTER], _dropout_of(self)
        )
        return result.view(*x.shape[:-1], -1)

    return type(f"Fused{kind.__name__}", (kind,), {"forward": forward})


def _dropout_of(module: Any) -> float:
    """The probability with which an input of the adapter is dropped now."""
    dropout = module.lora_dropout[_ADAPTER]
    return float(dropout.p) if module.training and isinstance(dropout, torch.nn.Dropout) else 0.0


def _is_plain(module: Any) -> bool:
    base = module.get_base_layer()
    kind = type(base).__name__
    known = type(base) is torch.nn.Linear or (
        getattr(base.weight, "quant_state", None) is not None if kind == "Linear4bit" else kind == "Linear8bitLt"
    )
    return bool(
        known
        and module.active_adapters == [_ADAPTER]
        and _ADAPTER in module.lora_A
        and not module.lora_variant
        and not any(getattr(module, "lora_bias", {}).values())
        and type(module.lora_dropout[_ADAPTER]) in (torch.nn.Identity, torch.nn.Dropout)
        and not base.weight.requires_grad
    )
