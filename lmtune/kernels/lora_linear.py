"""A LoRA linear layer as one operation, `y = x Wᵀ + s (x Aᵀ) Bᵀ`, whose sum is rounded once.

In 16 bit, PEFT's layer rounds the base output and then adds the adapter's much smaller one. Where that is less than
half a unit in the last place, the sum rounds back to the base output: the update is lost, always in the same direction.
Here the low-rank product comes first, and the base product is added to it before it is rounded, so a small update
changes how often the sum rounds up. Training in 16 bit then learns what it learns in fp32. The backward pass sums the
gradient of x in the same way. A bias comes last: it is added to the sum, not to the small addend.

A CPU accumulates a product onto a matrix in fp32. A GPU's `addmm` does not: cuBLAS rounds the product to 16 bit first
(H100, torch 2.11, all shapes tried: 48 % of a small update arrives, as in PEFT). There the product is kept in fp32
until the sum, or, faster, `lmtune.kernels.lora_group` makes the sum one product.

The operation keeps only `x` and `x Aᵀ` for the backward pass and writes `[T, out]` twice. Over a quantized base, W is
dequantized inside the operation, or once where memory allows, with the same values. DoRA is `y = c ⊙ (x Wᵀ + s (x Aᵀ)
Bᵀ)` with `c = magnitude / ‖W + s B A‖` of each row, in which the part `(c - 1) ⊙ x Wᵀ` belongs to the small addend.

    fuse(model)       # each LoRA layer that is a linear layer takes this path; the others stay as they are

Where PEFT is told an adapter for each row of a batch (`adapter_names`), all rows are one product with W, and their
low-rank parts one product over the adapters side by side, of which each row keeps its own: as exact as alone, also in
16 bit, and with DoRA, which PEFT refuses there.

The layer stays PEFT's own object with PEFT's parameter names: only its class becomes a subclass with another forward,
so saving, merging and switching adapters work as before. LoRA: https://arxiv.org/abs/2106.09685; DoRA:
https://arxiv.org/abs/2402.09353.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from lmtune.errors import LmtuneError


class _LoraLinear(torch.autograd.Function):
    """`x[T, in]`, `W[out, in]`, bias `[out]` or None, `A[r, in]`, `B[out, r]`, scaling s, dropout probability p."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, source: BaseWeight, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor,
        s: float, p: float,
    ) -> torch.Tensor:  # fmt: skip
        a, b = a.to(x.dtype), b.to(x.dtype)
        dropped, mask = _dropped(x, p)
        h = (dropped @ a.t()).mul_(s)  # [T, r]
        y = source.add_to(h @ b.t(), x)
        ctx.save_for_backward(x, h, a, b, mask)
        ctx.source, ctx.s, ctx.keep = source, s, 1 - p
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (g,) = grads
        x, h, a, b, mask = ctx.saved_tensors
        gb = (g @ b).mul_(ctx.s)  # [T, r]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = gb @ a
            if mask is not None:
                dx.mul_(mask).div_(ctx.keep)
            dx = add_product(dx, g, ctx.source.dense(g.dtype))
        dropped = x if mask is None else (x * mask).div_(ctx.keep)
        return dx, None, None, (gb.t() @ dropped).float(), (g.t() @ h).float(), None, None


class _DoraLinear(torch.autograd.Function):
    """As `_LoraLinear`, with each output scaled by `c[out]`, fp32, which has a gradient too.

    With `v = d Wᵀ + s (d Aᵀ) Bᵀ` of the dropped input d, the result is `x Wᵀ + [(c - 1) ⊙ v + s (d Aᵀ) Bᵀ]`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, source: BaseWeight, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor,
        c: torch.Tensor, s: float, p: float,
    ) -> torch.Tensor:  # fmt: skip
        a, b = a.to(x.dtype), b.to(x.dtype)
        dropped, mask = _dropped(x, p)
        h = (dropped @ a.t()).mul_(s)
        weight = source.dense(x.dtype)
        low_rank = h @ b.t()
        v = torch.addmm(low_rank, dropped, weight.t())
        more = (c - 1).to(x.dtype)
        y = add_product(low_rank.addcmul_(v, more), x, weight.t())
        ctx.save_for_backward(x, h, v, a, b, more, mask)
        ctx.source, ctx.s, ctx.keep = source, s, 1 - p
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (g,) = grads
        x, h, v, a, b, more, mask = ctx.saved_tensors
        scaled = torch.addcmul(g, g, more)  # c ⊙ g
        gb = (scaled @ b).mul_(ctx.s)
        dx = None
        if ctx.needs_input_grad[0]:
            weight = ctx.source.dense(g.dtype)
            dx = add_product(gb @ a, g * more, weight)
            if mask is not None:
                dx.mul_(mask).div_(ctx.keep)
            dx = add_product(dx, g, weight)
        dropped = x if mask is None else (x * mask).div_(ctx.keep)
        dc = (g * v).sum(0, dtype=torch.float32)
        return dx, None, None, (gb.t() @ dropped).float(), (scaled.t() @ h).float(), dc, None, None


def add_product(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`y[T, out] + a[T, in] @ b[in, out]`, rounded once; `y` may be its place."""
    if addmm_rounds_once(y.device, y.dtype):
        return y.addmm_(a, b)
    return product_in_fp32(a, b).add_(y).to(y.dtype)


def product_in_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` of 16-bit matrices in fp32, not rounded to 16 bit."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.device.type == "cuda" else a.float() @ b.float()


@functools.cache
def addmm_rounds_once(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `y.addmm_(a, b)` adds the product to y before it rounds it, found by trying."""
    if dtype.itemsize > 2:
        return True
    part = 0.375 * torch.finfo(dtype).eps  # alone it rounds 1 down, twice up
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        a, b = (torch.zeros(shape, dtype=dtype, device=device) for shape in ((256, 64), (64, 256)))
        a[:, 0], a[:, 1], b[:2] = 1.0, part, 1.0
        return bool((torch.full((256, 256), part, dtype=dtype, device=device).addmm_(a, b) > 1).all())


def _dropped(x: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x with a share p of its elements dropped, and the mask of those that were kept."""
    return torch.native_dropout(x, p, True) if p > 0 else (x, None)


class BaseWeight:
    """The frozen weight `W[out, in]` of a base layer, in full precision, 4 or 8 bit, as a dense matrix.

    `keep` holds the dense matrix of a quantized weight instead of making it at each call; the values are the same.
    """

    def __init__(self, layer: Any, keep: bool = False) -> None:
        self.layer, self.keep = layer, keep and _is_quantized(layer)
        self._dense: torch.Tensor | None = None
        self._squared_norms: torch.Tensor | None = None

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`y[T, out] + x[T, in] Wᵀ`, rounded once; `y` may be its place."""
        state = self._quant_state
        if state is None or self._dense is not None or len(x) > 1 or x.requires_grad:
            return add_product(y, x, self.dense(x.dtype).t())
        from bitsandbytes import matmul_4bit

        # one token, as in generation: bitsandbytes multiplies by the 4-bit weight without making it dense
        return y.copy_(y + matmul_4bit(x.float(), self.layer.weight, quant_state=state))

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight in `dtype`."""
        if self._dense is not None and self._dense.dtype == dtype:
            return self._dense
        weight = self._dequantized(dtype)
        if self.keep:
            self._dense = weight
        return weight

    def is_dense(self, dtype: torch.dtype) -> bool:
        """Whether a dense matrix in `dtype` is held, as `[out, in]`."""
        return self.keep or (type(self.layer) is torch.nn.Linear and self.layer.weight.dtype == dtype)

    def hold(self, dense: torch.Tensor) -> None:
        """Take `dense`, which has the same values, for the dense matrix that is held."""
        if self.keep:
            self._dense = dense
        else:
            self.layer.weight.data = dense

    def drop(self) -> None:
        """Let go of a kept dense matrix."""
        self._dense = None

    @torch.no_grad()
    def row_norms(self, a: torch.Tensor, b: torch.Tensor, s: float, dtype: torch.dtype) -> torch.Tensor:
        """`[out]` fp32: the norms of the rows of `W + s B A`, from products with W in `dtype`, without that sum."""
        a, b, weight = a.float(), b.float() * s, self.dense(dtype)
        if self._squared_norms is None:
            self._squared_norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        with_base = ((weight @ a.to(dtype).t()) * b).sum(1)
        return (self._squared_norms + 2 * with_base + ((b @ (a @ a.t())) * b).sum(1)).clamp_(0).sqrt()

    @property
    def _quant_state(self) -> Any:
        """Of 4 bit; a weight that is shared out over processes has left it to its layer."""
        own = getattr(self.layer.weight, "quant_state", None)
        return getattr(self.layer, "quant_state", None) if own is None else own

    def _dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        weight = self.layer.weight
        if (state := self._quant_state) is not None:
            from bitsandbytes.functional import dequantize_4bit

            dense: torch.Tensor = dequantize_4bit(weight.data, state)
            return dense.to(dtype)
        if weight.dtype == torch.int8:
            held = getattr(weight, "SCB", None)
            largest = self.layer.state.SCB if held is None else held  # moved at the first forward
            exact: torch.Tensor = weight.data * (largest / 127.0).float()[:, None]  # fp32, rounded once
            return exact.to(dtype)
        plain: torch.Tensor = weight.detach().to(dtype)
        return plain.t() if type(self.layer).__name__ == "Conv1D" else plain  # GPT-2 stores [in, out]


def fuse(model: torch.nn.Module, keep_dense: bool = False) -> list[str]:
    """Give every LoRA layer over a linear layer the fused forward pass; returns the names of those left as they are.

    The base may be in full precision, 4 or 8 bit, and the adapters with or without DoRA; left are layers of other
    kinds, and variants of LoRA, also where one comes to a layer that had the fused pass. In 8 bit this is the weights
    rounded and nothing else; bitsandbytes' own layer rounds activations too where it can.

    Args:
        model: a PeftModel.
        keep_dense: hold quantized weights as dense matrices, where memory allows.
    """
    from peft.tuners.lora import LoraLayer

    left = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if type(module).__name__.startswith("Fused"):
            if not _is_fusible(module):
                module.__class__ = type(module).__base__
                left.append(name)
        elif _is_fusible(module):
            module.lmtune_weight, module.lmtune_group = BaseWeight(module.get_base_layer(), keep_dense), None
            module.__class__ = _fused_class(type(module))
        else:
            left.append(name)
    return left


def drop_dense(model: Any) -> bool:
    """Let go of all dense matrices beside quantized weights, and make them at each call from now on.

    Returns:
        Whether there were any to be held. The values stay the same.
    """
    layers = [module for module in model.modules() if isinstance(getattr(module, "lmtune_weight", None), BaseWeight)]
    held = [layer for layer in layers if layer.lmtune_weight.keep]
    for layer in held:
        layer.lmtune_group, layer.lmtune_weight.keep = None, False
        layer.lmtune_weight.drop()
    return bool(held)


def exact_magnitudes(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Set the magnitudes of new DoRA layers to the fp32 norms of their rows, so that they begin as the base.

    PEFT rounds them to 16 bit where the base is. `dtype` is that of the forward pass, to which weights are rounded.
    """
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer) and _is_fusible(module):
            weight = BaseWeight(module.get_base_layer())
            for name, magnitude in module.lora_magnitude_vector.items():
                a, b = module.lora_A[name].weight, module.lora_B[name].weight
                magnitude.weight.data = weight.row_norms(a, b, module.scaling[name], dtype)


def _fused_class(kind: type[Any]) -> type[Any]:
    """A subclass of PEFT's layer class with the fused forward pass."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        of_rows = kwargs.get("adapter_names")
        if of_rows is not None and len(kwargs) == 1 and not (args or self.merged or self.disable_adapters):
            return _mixed(self, x, of_rows)
        names = [name for name in self.active_adapters if name in self.lora_A]
        is_alone = len(names) == 1
        if (
            self.disable_adapters or self.merged or args or kwargs or not names
            or (not is_alone and (self.lora_magnitude_vector or any(_dropout(self, name) for name in names)))
        ):  # fmt: skip
            output: torch.Tensor = kind.forward(self, x, *args, **kwargs)
            return output
        if is_alone and self.lmtune_group is not None:
            grouped = self.lmtune_group(self, x)
            if grouped is not None:
                return grouped.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        flat = x.reshape(-1, x.shape[-1])  # [T, in]
        base = self.get_base_layer()
        weight = self.lmtune_weight if self.lmtune_weight.layer is base else BaseWeight(base)  # replaced for a while
        if is_alone:
            (name,) = names
            a, b, s, p = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name], _dropout(self, name)
        else:  # their sum is one adapter of the sum of their ranks
            a = torch.cat([self.lora_A[name].weight for name in names])
            b = torch.cat([self.lora_B[name].weight * self.scaling[name] for name in names], 1)
            s, p = 1.0, 0.0
        if names[0] in self.lora_magnitude_vector:
            c = self.lora_magnitude_vector[name].weight / weight.row_norms(a, b, s, flat.dtype)
            result = _DoraLinear.apply(flat, weight, base.bias, a, b, c, s, p)  # type: ignore[no-untyped-call]
        else:
            result = _LoraLinear.apply(flat, weight, base.bias, a, b, s, p)  # type: ignore[no-untyped-call]
        return result.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]

    return type(f"Fused{kind.__name__}", (kind,), {"forward": forward})


def _mixed(layer: Any, x: torch.Tensor, of_rows: Sequence[str]) -> torch.Tensor:
    """The output `[B, T, out]` of a fused layer for `x[B, T, in]`, each row by the adapter of its name; no gradient.

    A name that the layer has no adapter of stands for its base.
    """
    if x.dim() != 3 or len(x) != len(of_rows):
        raise LmtuneError(
            f"adapters of several requests in one batch: a layer reads {list(x.shape)}, not {len(of_rows)} rows of "
            "tokens, as in mixtures of experts; answer with one adapter at a time"
        )
    base, names = layer.get_base_layer(), [name for name in dict.fromkeys(of_rows) if name in layer.lora_A]
    if not names:
        plain: torch.Tensor = base(x)
        return plain
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    weight = layer.lmtune_weight if layer.lmtune_weight.layer is base else BaseWeight(base)
    ranks = torch.tensor([len(layer.lora_A[name].weight) for name in names])
    a = torch.cat([layer.lora_A[name].weight for name in names]).to(x.dtype)  # [R, in]
    b = torch.cat([layer.lora_B[name].weight * layer.scaling[name] for name in names], 1).to(x.dtype)  # [out, R]
    place = {name: index for index, name in enumerate(names)}
    own = torch.tensor([place.get(name, -1) for name in of_rows])[:, None] == torch.repeat_interleave(ranks)  # [B, R]
    h = torch.where(own.to(x.device)[:, None], x @ a.t(), 0)
    y, flat = (h @ b.t()).flatten(0, 1), x.flatten(0, 1)  # [B T, out], [B T, in]
    scaled = [name for name in names if name in layer.lora_magnitude_vector]
    if scaled:  # as `_DoraLinear`, with another `c` for each row
        more = y.new_zeros(len(x), y.shape[1])
        for name in scaled:
            norms = weight.row_norms(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], x.dtype)
            c = layer.lora_magnitude_vector[name].weight / norms
            more[[index for index, one in enumerate(of_rows) if one == name]] = (c - 1).to(x.dtype)
        v = add_product(y.clone(), flat, weight.dense(x.dtype).t())
        y.addcmul_(v, more.repeat_interleave(x.shape[1], 0))
    y = weight.add_to(y, flat)
    return (y if base.bias is None else y.add_(base.bias)).view(*x.shape[:2], -1)


def _dropout(module: Any, adapter: str) -> float:
    """The probability with which an input of the adapter is dropped now."""
    dropout = module.lora_dropout[adapter]
    return float(dropout.p) if module.training and isinstance(dropout, torch.nn.Dropout) else 0.0


def _is_quantized(layer: Any) -> bool:
    return type(layer).__name__ in ("Linear4bit", "Linear8bitLt")


def _is_fusible(module: Any) -> bool:
    """Whether each adapter of a LoRA layer is the plain one, or DoRA, of a frozen linear layer."""
    base = module.get_base_layer()
    is_linear = type(base) is torch.nn.Linear or type(base).__name__ == "Conv1D" or _is_quantized(base)
    return bool(
        is_linear
        and module.lora_A
        and not base.weight.requires_grad
        and all(type(variant).__name__ == "DoraLinearVariant" for variant in module.lora_variant.values())
        and not any(getattr(module, "lora_bias", {}).values())
        and all(type(d) in (torch.nn.Identity, torch.nn.Dropout) for d in module.lora_dropout.values())
    )
