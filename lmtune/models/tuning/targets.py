"""Which weights get an adapter; the same answer for a loaded model and for one on the meta device (`lmtune plan`).

    found = find_targets(model, "all-linear")          # full names of layers and of experts' tensors
    LoraConfig(**for_peft(model, "all-linear", found)) # in PEFT's words

`all-linear` is every linear layer but the head, and every tensor of fused experts (`gate_up_proj[E, 2 I, D]`); routers
are not adapted, nor what kernels of Mamba layers read past an adapter. PEFT adapts such a tensor through
`target_parameters`, but for some models rewrites `target_modules` so that dense layers of the same name get no adapter
and the router gets one. So such a layer is listed by its weight.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from lmtune.errors import ConfigError
from lmtune.io.text import shorten
from lmtune.models.structure import expert_tensors, head_of, linear_layers
from lmtune.models.tuning.adapter_files import is_too_slow_to_match, pattern_problems

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Targets:
    """Full names of the linear layers and of the experts' tensors that get an adapter."""

    modules: tuple[str, ...]
    experts: tuple[str, ...]


class PeftTargets(TypedDict):
    """The two settings of a `LoraConfig`."""

    target_modules: str | list[str]
    target_parameters: list[str] | None


def routers(model: PreTrainedModel) -> set[str]:
    """Full names of the routers of fused experts: beside the experts, with one output for each."""
    blocks = {}
    for name, tensor in expert_tensors(model).items():
        blocks[name.rpartition(".")[0].rpartition(".")[0] + "."] = len(tensor)
    return {
        name
        for name, module in model.named_modules()
        for block, experts in blocks.items()
        if name.startswith(block) and getattr(module, "weight", None) is not None
        and module.weight.dim() == 2 and (getattr(module, "out_features", None) or len(module.weight)) == experts
    }  # fmt: skip


def read_by_kernels(model: PreTrainedModel) -> set[str]:
    """Full names of the linear layers of Mamba layers but `in_proj`: kernels read their weights past an adapter.

    A Mamba layer is told by its parameters `A_log` and `D`.
    """
    found: set[str] = set()
    for name, module in model.named_modules():
        if {"A_log", "D"} <= {key for key, _ in module.named_parameters(recurse=False)}:
            inside = linear_layers(module)
            found |= {f"{name}.{layer}" for layer in inside if layer != "in_proj"}
    return found


def other_parts(model: PreTrainedModel) -> dict[str, str]:
    """Linear layers outside the text decoder and its head, by full name, with their part: `vision_tower`, a projector.

    Empty for a model of text only.
    """
    config = model.config
    if config.get_text_config() is config or not hasattr(model, "get_decoder"):
        return {}
    decoder = model.get_decoder()
    inside = next((name for name, module in model.named_modules() if module is decoder), "")
    around, head = inside.rpartition(".")[0], head_of(model)
    return {
        name: name.removeprefix(f"{around}.").partition(".")[0]
        for name in linear_layers(model)
        if inside and not name.startswith(f"{inside}.") and model.get_submodule(name) is not head
    }


def find_targets(model: PreTrainedModel, targets: str | Sequence[str]) -> Targets:
    """What `target_modules` names in `model`, which has no adapter and may be on the meta device.

    Args:
        model: a causal language model.
        targets: `all-linear`, a regular expression on full names, or a list of full names or last parts of names. All
            names that the layers of an expert have in files, such as `gate_proj` and `up_proj`, are the experts' too.

    Raises:
        ConfigError: a target names nothing in the model, or only a part of a tensor.
    """
    others, tensors = other_parts(model), expert_tensors(model)
    layers = {name: size for name, size in linear_layers(model).items() if name not in others}
    if targets == ALL_LINEAR:
        left = routers(model) | read_by_kernels(model)
        left |= {name for name, module in model.named_modules() if module is head_of(model)}
        return Targets(tuple(name for name in layers if name not in left), tuple(tensors))
    parts = _stored_parts(model, tensors)
    _check_patterns(targets, [*layers, *tensors, *(name for names in parts.values() for name in names)])
    endings = [targets] if isinstance(targets, str) else [rf"(.*\.)?{re.escape(target)}" for target in targets]
    matchers = [re.compile(ending).fullmatch for ending in endings]

    def named(name: str) -> bool:
        return any(matches(name) for matches in matchers)

    reached = [*layers, *tensors]
    experts = [name for name in tensors if named(name) or (parts[name] and all(map(named, parts[name])))]
    wanted = [targets] if isinstance(targets, str) else list(targets)
    missing = {w: matches for w, matches in zip(wanted, matchers, strict=True) if not any(map(matches, reached))}
    if missing:
        raise ConfigError(_nothing_named(missing, layers, parts))
    return Targets(tuple(filter(named, layers)), tuple(experts))


def for_peft(model: PreTrainedModel, targets: str | Sequence[str], found: Targets) -> PeftTargets:
    """`target_modules` and `target_parameters` with which PEFT adapts what was found, no more and no less.

    They are what the user wrote, unless PEFT would take it for other things: in a model of more than text, in one with
    Mamba layers, and in one whose kind PEFT knows as a mixture of experts, whether it has experts or not.
    """
    parts = {part for leaf, made_of in _fused_from(model).items() for part in (leaf, *made_of)}
    parts |= {name.rpartition(".")[2] for name in expert_tensors(model)}
    is_whole = targets != ALL_LINEAR or not read_by_kernels(model)
    if not parts and not other_parts(model) and is_whole:
        return {"target_modules": targets if isinstance(targets, str) else list(targets), "target_parameters": None}
    by_weight = [name for name in found.modules if name.rpartition(".")[2] in parts]
    modules = [name for name in found.modules if name not in by_weight]
    parameters = [*found.experts, *(f"{name}.weight" for name in by_weight)]
    return {
        "target_modules": _shortest(modules, (name for name, _ in model.named_modules())),
        "target_parameters": _shortest(parameters, (name for name, _ in model.named_parameters())) or None,
    }


def use_layers_own_adapter(config: LoraConfig) -> None:
    """Let a `LoraConfig` that names the weight of a linear layer adapt the layer as if it were named itself.

    Numbers and saved tensors are the same, but the layer may be quantized, and needs no copy of the weight's size.
    """

    def create(target: Any, adapter_name: str, config: Any, parameter_name: str | None = None, **kwargs: Any) -> Any:
        from peft.tuners.lora import LoraModel

        plain = copy.copy(config)
        plain._custom_modules = None
        return LoraModel._create_new_module(plain, adapter_name, target, parameter_name=None, **kwargs)

    config._register_custom_module({torch.nn.Linear: create})


def adapter_parameters(model: PreTrainedModel, found: Targets, rank: int, use_dora: bool = False) -> int:
    """How many parameters an adapter of `rank` over `found` has."""
    layers, tensors = linear_layers(model), expert_tensors(model)
    in_layers = sum(rank * sum(layers[name]) + use_dora * layers[name][1] for name in found.modules)
    return in_layers + sum(rank * len(tensors[name]) * sum(tensors[name].shape[1:]) for name in found.experts)


def _stored_parts(model: PreTrainedModel, tensors: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """For each experts' tensor, the full names that the layers it is made of have in the model's files, less numbers.

    `…mlp.experts.gate_up_proj` is made of `…mlp.experts.gate_proj` and `…mlp.experts.up_proj`.
    """
    found, made_of = {}, _fused_from(model)
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        found[name] = tuple(f"{module}.{part}" for part in made_of.get(leaf, ()))
    return found


def _fused_from(model: PreTrainedModel) -> dict[str, list[str]]:
    """Last parts of names: of parameters that transformers makes of several stored ones, with the names of those."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return {
        way.target_patterns[0].rpartition(".")[2]: [
            source.removesuffix(".weight").rpartition(".")[2] for source in way.source_patterns
        ]
        for way in get_model_conversion_mapping(model)
        if len(way.target_patterns) == 1 and hasattr(way, "operations")
    }


def _check_patterns(targets: str | Sequence[str], names: Sequence[str]) -> None:
    if problem := next(pattern_problems({"target_modules": targets}), None):
        raise ConfigError(f"tuning.{problem}; name layers, or write all-linear")
    if is_too_slow_to_match({"target_modules": targets}, names):
        raise ConfigError(
            f"tuning.target_modules: {shorten(targets)}: this regular expression is too slow (possible catastrophic "
            "backtracking); write it more simply"
        )


def _nothing_named(
    missing: Mapping[str, Callable[[str], Any]], layers: Iterable[str], parts: dict[str, tuple[str, ...]]
) -> str:
    """A message that says what exists instead of the `missing` targets."""

    def last(names: Iterable[str]) -> str:
        return ", ".join(sorted({name.rpartition(".")[2] for name in names}))

    inside = {name for name, made_of in parts.items() for part in made_of if any(m(part) for m in missing.values())}
    where = f" (inside the experts it is a part of {last(inside)}, which can be named as a whole)" if inside else ""
    experts = f"; the tensors of its experts are {last(parts)}" if parts else ""
    return (
        f"tuning.target_modules: nothing in this model is named {', '.join(missing)}{where}; "
        f"its linear layers are {last(layers)}{experts} (or all-linear)"
    )


def _shortest(wanted: Sequence[str], names: Iterable[str]) -> list[str]:
    """The shortest last parts of names that select the `wanted` ones and none of the other `names`."""

    def endings(name: str) -> list[str]:
        parts = name.split(".")
        return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]

    chosen = set(wanted)
    others = {ending for name in names if name not in chosen for ending in endings(name)}
    return sorted({next((ending for ending in endings(name) if ending not in others), name) for name in wanted})
