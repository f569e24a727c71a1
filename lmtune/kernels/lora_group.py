"""LoRA layers that are given the same input as one layer, `[x | h] @ [W | s B]ᵀ` with `h = x Aᵀ`, rounded once.

For GPUs, whose matrix library rounds a product before it adds anything to it: here the low-rank part is a part of the
product itself, in the forward pass, and in the backward pass too, `[g | g s B] @ [W ; A]`. Queries, keys and values
become one layer, as do gate and up projection: fewer and larger products, and one gradient of their common input
instead of a sum of rounded ones.

    group_layers(model, run)        # after `fuse`; `run` makes a forward pass, in which layers of one input are found

There is no second copy of the weights: those of a group's layers become views of its matrix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lmtune.kernels.lora_linear import addmm_rounds_once, product_in_fp32

_MULTIPLE = 16  # of the ranks of a group together, so that rows begin where a GPU reads them at once


class LoraGroup:
    """Layers with O outputs and R ranks together, over one matrix `[O + R, in + R]`.

    Of queries, keys and values it is, with zeros elsewhere:

        W_q  s B_q
        W_k        s B_k
        W_v              s B_v
        A_q
        A_k
        A_v
    """

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype) -> None:
        """`layers` are fused, with one adapter each; their dense weights become views of the matrix."""
        self.layers = list(layers)
        adapters = [_adapter(layer) for layer in layers]
        outputs, ranks = [layer.out_features for layer in layers], [len(a) for a, _, _ in adapters]
        self.inputs, self.outputs = layers[0].in_features, sum(outputs)
        self.rows, self.columns = _slices(outputs), _slices(ranks)
        self.padding = -sum(ranks) % _MULTIPLE
        rank = sum(ranks) + self.padding
        self.matrix = torch.zeros(self.outputs + rank, self.inputs + rank, dtype=dtype, device=adapters[0][0].device)
        self.a = self.matrix[self.outputs :, : self.inputs]
        self.own = [self.matrix[rows] for rows in self.rows]  # of each layer, its weight and where B stands
        self._adapter_places = [
            (self.a[columns], own[:, self.inputs :][:, columns])
            for own, columns in zip(self.own, self.columns, strict=True)
        ]
        for layer, rows in zip(layers, self.rows, strict=True):
            own = self.matrix[rows, : self.inputs]
            own.copy_(layer.lmtune_weight.dense(dtype))
            layer.lmtune_weight.hold(own)
        self._places = [layer.lmtune_weight.dense(dtype).data_ptr() for layer in layers]
        self._active = list(layers[0].active_adapters)
        self._results: dict[int, torch.Tensor] = {}
        self._input: torch.Tensor | None = None

    def __call__(self, layer: Any, x: torch.Tensor) -> torch.Tensor | None:
        """The output `[T, out]` of one of the layers for `x[…, in]`, or None where it is to compute by itself.

        The first layer of a group computes for all; the others find their results if they are given the same input.
        """
        index = next(index for index, one in enumerate(self.layers) if one is layer)
        if index == 0:
            self._compute(x)
        if self._input is not x:
            return None
        found = self._results.pop(index, None)
        if not self._results:
            self._input = None
        return found

    def _compute(self, x: torch.Tensor) -> None:
        self._input, self._results = None, {}
        if any(layer.active_adapters != self._active for layer in self.layers):
            return
        adapters = [_adapter(layer) for layer in self.layers]
        ranks = [columns.stop - columns.start for columns in self.columns]
        weights = [layer.lmtune_weight.dense(x.dtype) for layer in self.layers]
        if x.dtype != self.matrix.dtype or [len(a) for a, _, _ in adapters] != ranks:
            return
        if [weight.data_ptr() for weight in weights] != self._places:  # replaced for a while
            return
        scales, ab = tuple(s for _, _, s in adapters), [part for a, b, _ in adapters for part in (a, b)]
        results = _GroupedLora.apply(x.reshape(-1, self.inputs), self, scales, *ab)  # type: ignore[no-untyped-call]
        self._input, self._results = x, dict(enumerate(results))

    def fill(self, scales: Sequence[float], ab: Sequence[torch.Tensor]) -> None:
        """Put the adapters' present values, A and B of each layer, into the matrix."""
        for places, s, a, b in zip(self._adapter_places, scales, ab[::2], ab[1::2], strict=True):
            places[0].copy_(a)
            torch.mul(b, s, out=places[1])


class _GroupedLora(torch.autograd.Function):
    """`x[T, in]`, the group, the scalings, and A, B of each layer; a result for each layer."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: LoraGroup, scales: tuple[float, ...], *ab: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        group.fill(scales, ab)
        wide = torch.cat([x, x @ group.a.t()], 1)  # [x | h]
        ctx.save_for_backward(wide)
        ctx.group, ctx.scales = group, scales
        results = []
        for own, layer in zip(group.own, group.layers, strict=True):
            y, bias = wide @ own.t(), layer.get_base_layer().bias
            results.append(y if bias is None else y.add_(bias))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (wide,) = ctx.saved_tensors
        group: LoraGroup = ctx.group
        products = [g @ places[1] for g, places in zip(grads, group._adapter_places, strict=True)]
        padding = [wide.new_zeros(len(wide), group.padding)] if group.padding else []
        g = torch.cat([*grads, *products, *padding], 1)  # [gradients of the results | their products with s B]
        dx = g @ group.matrix[:, : group.inputs] if ctx.needs_input_grad[0] else None
        da = product_in_fp32(g[:, group.outputs :].t(), wide[:, : group.inputs])  # [R, in]
        db = product_in_fp32(g[:, : group.outputs].t(), wide[:, group.inputs :])  # [O, R]
        of_adapters = []
        for rows, columns, s in zip(group.rows, group.columns, ctx.scales, strict=True):
            of_adapters += [da[columns], db[rows, columns].mul_(s)]
        return dx, None, None, *of_adapters


def group_layers(model: torch.nn.Module, run: Callable[[], object]) -> list[LoraGroup]:
    """Make groups of the fused layers of `model` that are given the same input, where a GPU gains by it.

    Grouped are layers over linear layers in 16 bit, or over quantized ones that are kept dense, with one adapter each,
    without DoRA or dropout.

    Args:
        model: a PeftModel after `fuse`.
        run: makes a forward pass of `model`.
    """
    found: list[tuple[Any, Any]] = []
    layers = [module for module in model.modules() if getattr(module, "lmtune_weight", None) is not None]
    hooks = [
        layer.register_forward_pre_hook(lambda one, args: found.append((one, args[0] if args else None)))
        for layer in layers
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    together: list[list[Any]] = []
    for before, (layer, x) in zip([(None, None), *found], found, strict=False):
        if not isinstance(x, torch.Tensor) or not _can_join(layer, x.dtype):
            continue
        if together and before[1] is x and together[-1][-1] is before[0]:
            together[-1].append(layer)
        else:
            together.append([layer])
    called, groups = Counter(id(layer) for layer, _ in found), list[LoraGroup]()
    for some in together:
        if all(called[id(layer)] == 1 for layer in some):
            groups.append(LoraGroup(some, next(x.dtype for layer, x in found if layer is some[0])))
            for layer in some:
                layer.lmtune_group = groups[-1]
    return groups


def separate_layers(model: torch.nn.Module) -> None:
    """Let each layer of `model` compute by itself again."""
    for module in model.modules():
        if getattr(module, "lmtune_group", None) is not None:
            module.lmtune_group = None  # type: ignore[assignment]


def _can_join(layer: Any, dtype: torch.dtype) -> bool:
    return bool(
        dtype.itemsize == 2
        and layer.lmtune_weight.is_dense(dtype)
        and not addmm_rounds_once(layer.get_base_layer().weight.device, dtype)
        and len(layer.active_adapters) == 1
        and not layer.lora_magnitude_vector
        and all(isinstance(dropout, torch.nn.Identity) for dropout in layer.lora_dropout.values())
    )


def _adapter(layer: Any) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A, B and the scaling of the active adapter."""
    (name,) = layer.active_adapters
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


def _slices(sizes: Sequence[int]) -> list[slice]:
    """Places of parts of these sizes, one after another."""
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
