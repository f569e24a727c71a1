"""How far a model moves when its weights are rounded to fewer bits: what to expect of another engine's file.

    with rounded(model, "q8_0"):
        model(...)              # each linear layer and embedding computes with rounded weights and inputs

llama.cpp rounds the inputs of a layer, too: to 8 bits where its weights have 8 or fewer, else to 16. Nothing is written
and no weight is changed: a hook adds what rounding changes in a layer's output. Of `q4_k_m` it is near, not equal: the
embeddings and the head have 6 bits, as in llama.cpp, which takes the scale of a group with some care and gives a few
layers more bits, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

Rounding = Literal["f16", "q8_0", "q4_k_m"]
Precision = Literal["f16", "bf16", "q8_0", "q4_k_m"]  # of what is served; of bf16 it is the computation that tells
ROUNDINGS: tuple[Rounding, ...] = ("f16", "q8_0", "q4_k_m")
PRECISIONS: tuple[Precision, ...] = ("f16", "bf16", "q8_0", "q4_k_m")
_GROUP = 32  # weights that share a scale
_LARGE_GROUP = 256  # inputs that do, where weights have k-quants


@contextlib.contextmanager
def rounded(model: torch.nn.Module, kind: Rounding) -> Iterator[None]:
    """Inside the block the layers of `model`, adapters merged, compute as with weights of `kind`."""
    from peft.tuners.lora import LoraLayer

    inside = {id(part) for one in model.modules() if isinstance(one, LoraLayer) for part in one.modules()} - {
        id(one) for one in model.modules() if isinstance(one, LoraLayer)
    }
    tables = {id(one) for one in (model.get_input_embeddings(), model.get_output_embeddings())}  # type: ignore[operator]

    def hook(layer: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        is_table = not tables.isdisjoint({id(layer), id(getattr(layer, "base_layer", layer))})
        return out + _change(layer, args[0], kind, is_table)

    handles = []
    for module in model.modules():
        if id(module) in inside or not isinstance(module, (LoraLayer, torch.nn.Linear, torch.nn.Embedding)):
            continue
        handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def round_rows(weight: torch.Tensor, kind: Rounding, is_table: bool = False) -> torch.Tensor:
    """fp32 `[N, K]` as it comes back from a file of this type; rows that do not fit its groups have 16 bits.

    `is_table`: the embeddings or the head.
    """
    if weight.shape[-1] % _GROUP:
        return weight.half().float()
    return _six_bits(weight) if is_table and kind == "q4_k_m" else _ROUNDED[kind](weight)


def round_inputs(hidden: torch.Tensor, kind: Rounding) -> torch.Tensor:
    """fp32 `[..., K]` as llama.cpp multiplies it with weights of this type: in 16 bits, or in 8."""
    if kind == "f16" or hidden.shape[-1] % _GROUP:
        return hidden.half().float()
    return _eight_bits(hidden, _LARGE_GROUP if kind == "q4_k_m" and hidden.shape[-1] % _LARGE_GROUP == 0 else _GROUP)


def _eight_bits(weight: torch.Tensor, group: int = _GROUP) -> torch.Tensor:
    groups = weight.reshape(-1, group)
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-12)
    return ((groups / scale).round() * scale.half().float()).reshape(weight.shape)


def _six_bits(weight: torch.Tensor) -> torch.Tensor:
    groups = weight.reshape(-1, _GROUP // 2)
    scale = (groups.abs().amax(-1, keepdim=True) / 31.5).clamp_min(1e-12)
    return ((groups / scale).round().clamp(-32, 31) * scale).reshape(weight.shape)


def _four_bits(weight: torch.Tensor) -> torch.Tensor:
    groups = weight.reshape(-1, _GROUP)
    low = groups.amin(-1, keepdim=True).clamp_max(0)
    scale = ((groups.amax(-1, keepdim=True) - low) / 15).clamp_min(1e-12)
    return (((groups - low) / scale).round().clamp(0, 15) * scale + low).reshape(weight.shape)


_ROUNDED: dict[Rounding, Callable[[torch.Tensor], torch.Tensor]] = {
    "f16": lambda weight: weight.half().float(), "q8_0": _eight_bits, "q4_k_m": _four_bits,
}  # fmt: skip


def _change(layer: Any, given: torch.Tensor, kind: Rounding, is_table: bool) -> torch.Tensor:
    """What rounding adds to the output of a layer."""
    base = getattr(layer, "base_layer", layer)
    if isinstance(base, torch.nn.Embedding):
        rows = base.weight[given].float()
        return (round_rows(rows, kind, is_table) - rows).to(base.weight.dtype)
    weight = base.weight.float()
    if not isinstance(base, torch.nn.Linear) or weight.dim() != 2 or given.shape[-1] != weight.shape[-1]:
        return given.new_zeros(())
    if base is not layer and not layer.disable_adapters:
        weight = weight + sum(layer.get_delta_weight(name).float() for name in layer.active_adapters)
    linear = torch.nn.functional.linear
    exact = linear(given.float(), weight)
    return (linear(round_inputs(given.float(), kind), round_rows(weight, kind, is_table)) - exact).to(given.dtype)
