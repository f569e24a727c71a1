"""LoRA layers that are given the same input as one layer, `[x | h] @ [W | B]ᵀ` with `h = x (s A)ᵀ`, rounded once.

For GPUs, whose matrix library rounds a product before it adds anything to it: here the low-rank part is a part of the
product itself, in the forward pass, and in the backward pass too, `[g | g B] @ [W ; s A]`. Queries, keys and values
become one layer, as do gate and up projection: fewer and larger products, and one gradient of their common input
instead of a sum of rounded ones.

    groups = group_layers(model, run)       # after `fuse`; `run` makes a forward pass, in which layers of one input
    with adapters_held(groups):             # are found
        ...                                 # the passes of one step, between which no adapter changes

There is no second copy of the weights: those of a group's layers become views of its matrix.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from lmtune.kernels.lora_linear import addmm_rounds_once, product_in_fp32

_MULTIPLE = 16  # of the ranks of a group together, so that rows begin where a GPU reads them at once


class LoraGroup:
    """Layers with O outputs and R ranks together, over one matrix `[O + R, in + R]`.

    Of queries, keys and values it is, with zeros elsewhere:

        W_q    B_q
        W_k         B_k
        W_v              B_v
        s A_q
        s A_k
        s A_v
    """

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype) -> None:
        """`layers` are fused, with one adapter each; their dense weights become views of the matrix."""
        self.layers = list(layers)
        adapters = [_adapter(layer) for layer in layers]
        outputs, ranks = [layer.out_features for layer in layers], [len(a) for a, _, _ in adapters]
        self.inputs, self.outputs = layers[0].in_features, sum(outputs)
        self.rows, self._columns = _slices(outputs), _slices(ranks)
        self.rank = sum(ranks) + -sum(ranks) % _MULTIPLE
        device = adapters[0][0].device
        self.matrix = torch.zeros(self.outputs + self.rank, self.inputs + self.rank, dtype=dtype, device=device)
        self.weight = self.matrix[: self.outputs]  # [W | B]
        self._a, self._b = self.matrix[self.outputs :, : self.inputs], self.weight[:, self.inputs :]
        self._adapter_places = [
            (self._a[columns], self._b[rows, columns]) for rows, columns in zip(self.rows, self._columns, strict=True)
        ]
        self._scales = torch.zeros(self.rank, 1, device=device)
        for (_, _, s), columns in zip(adapters, self._columns, strict=True):
            self._scales[columns] = s
        self._held_scales = [s for _, _, s in adapters]
        for layer, rows in zip(layers, self.rows, strict=True):
            own = self.weight[rows, : self.inputs]
            own.copy_(layer.lmtune_weight.dense(dtype))
            layer.lmtune_weight.hold(own)
        self._places = [layer.lmtune_weight.dense(dtype).data_ptr() for layer in layers]
        self._active = list(layers[0].active_adapters)
        self._results: dict[int, torch.Tensor] = {}
        self._input: torch.Tensor | None = None
        self._is_held = self._is_filled = False

    def __call__(self, layer: Any, x: torch.Tensor) -> torch.Tensor | None:
        """The output `[T, out]` of one of the layers for `x[…, in]`, or None where it is to compute by itself.

        The first layer of a group computes for all; the others find their results if they are given the same input.
        """
        index = next(index for index, one in enumerate(self.layers) if one is layer)
        if index == 0:
            self._input, self._results = None, {}
            if (adapters := self.adapters(x.dtype)) is not None:
                results = _GroupedLora.apply(  # type: ignore[no-untyped-call]
                    x.reshape(-1, self.inputs), self, *adapters
                )
                self._input, self._results = x, dict(enumerate(results))
        if self._input is not x:
            return None
        found = self._results.pop(index, None)
        if not self._results:
            self._input = None
        return found

    def adapters(self, dtype: torch.dtype) -> list[torch.Tensor] | None:
        """A and B of each layer, whose values are in the matrix now, or None where the layers compute by themselves."""
        for layer in self.layers:
            if layer.active_adapters != self._active or layer.disable_adapters or layer.merged:
                return None
        adapters = [_adapter(layer) for layer in self.layers]
        ranks = [columns.stop - columns.start for columns in self._columns]
        weights = [layer.lmtune_weight.dense(dtype) for layer in self.layers]
        if dtype != self.matrix.dtype or [len(a) for a, _, _ in adapters] != ranks:
            return None
        if [weight.data_ptr() for weight in weights] != self._places:  # replaced for a while
            return None
        if [s for _, _, s in adapters] != self._held_scales:
            return None
        if not self._is_filled:
            with torch.no_grad():
                for places, (a, b, s) in zip(self._adapter_places, adapters, strict=True):
                    torch.mul(a, s, out=places[0])
                    places[1].copy_(b)
            self._is_filled = self._is_held
        return [part for a, b, _ in adapters for part in (a, b)]

    def hold(self, held: bool) -> None:
        """While `held`, values that are in the matrix once are taken for the adapters' own."""
        self._is_held, self._is_filled = held, False

    def widen(self, x: torch.Tensor) -> torch.Tensor:
        """`[x | h]`, `[T, in + R]`, of `x[T, in]`."""
        return torch.cat([x, x @ self._a.t()], 1)

    def complete(self, wide: torch.Tensor) -> None:
        """Write h beside x in `wide[T, in + R]`."""
        torch.mm(wide[:, : self.inputs], self._a.t(), out=wide[:, self.inputs :])

    def gradients(
        self, g: torch.Tensor, wide: torch.Tensor, of_input: bool = True
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:  # fmt: skip
        """The gradient of x, and those of A and B of each layer, in fp32.

        Args:
            g: `[T, O + R]`, the gradients of the results, with room behind them, which is overwritten.
            wide: `[T, in + R]`.
            of_input: whether that of x is wanted.
        """
        torch.mm(g[:, : self.outputs], self._b, out=g[:, self.outputs :])
        dx = g @ self.matrix[:, : self.inputs] if of_input else None
        da = product_in_fp32(g[:, self.outputs :].t(), wide[:, : self.inputs]).mul_(self._scales)  # [R, in]
        db = product_in_fp32(g[:, : self.outputs].t(), wide[:, self.inputs :])  # [O, R]
        places = zip(self.rows, self._columns, strict=True)
        return dx, [part for rows, columns in places for part in (da[columns], db[rows, columns])]

    def with_room(self, *grads: torch.Tensor) -> torch.Tensor:
        """The gradients of the results `[T, out]` side by side, with room behind them, `[T, O + R]`."""
        return torch.cat([*grads, grads[0].new_empty(len(grads[0]), self.rank)], 1)


class _GroupedLora(torch.autograd.Function):
    """`x[T, in]`, the group, and A, B of each layer; a result for each layer."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: LoraGroup, *ab: torch.Tensor) -> tuple[torch.Tensor, ...]:
        wide = group.widen(x)
        ctx.save_for_backward(wide)
        ctx.group = group
        results = []
        for rows, layer in zip(group.rows, group.layers, strict=True):
            y, bias = wide @ group.weight[rows].t(), layer.get_base_layer().bias
            results.append(y if bias is None else y.add_(bias))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (wide,) = ctx.saved_tensors
        group: LoraGroup = ctx.group
        dx, of_adapters = group.gradients(group.with_room(*grads), wide, ctx.needs_input_grad[0])
        return dx, None, *of_adapters


@contextlib.contextmanager
def adapters_held(groups: Iterable[LoraGroup]) -> Iterator[None]:
    """Inside the block no adapter changes: its values are put into the matrix of its group once, not at every pass."""
    held = list(groups)
    for group in held:
        group.hold(True)
    try:
        yield
    finally:
        for group in held:
            group.hold(False)


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
