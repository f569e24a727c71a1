"""How many parameters a run trains, freezes and quantizes, and the precision of the rest, in one line.

    parameters: 11,008 trained (LoRA r=4 on 11 modules and 2 expert tensors, over 98,304 of the base); 156,288 frozen:
    49,152 in nf4, 107,136 in float32 (experts 49,152: 0.188 MiB; embeddings, head and norms 57,984); not adapted: …

The count is the same for a loaded base and for one on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lmtune.config.schema import FullConfig, LoraConfig, PartialConfig
from lmtune.io.text import pluralize, size_text
from lmtune.models.head import classifier_head
from lmtune.models.structure import expert_tensors, head_of, linear_layers
from lmtune.models.tuning.beside_lora import is_tied, whole_modules
from lmtune.models.tuning.partial import find_parameters
from lmtune.models.tuning.targets import (
    ALL_LINEAR,
    Targets,
    adapter_parameters,
    find_targets,
    other_parts,
    read_by_kernels,
    routers,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GIB = 2**30
_NO_TARGETS = Targets((), ())


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Attributes:
        trained: all that learn.
        what: those in words.
        own: of those, weights of the model itself; the others are an adapter's.
        own_linear: of those, what is in linear layers but the head, and in experts.
        trained_on_experts: of the adapter's, what is on experts.
        rank: of the adapter.
        targets: what it is on.
        linear: of all linear layers but the head, biases left out.
        experts: of the tensors of fused experts.
        other: of all else: embeddings, head, router, norms, biases.
        quantized: of those in linear layers, how many are held in `quantization`.
        quantization: `none`, `nf4` or `int8`.
        dtype: of the others, as `bfloat16`.
        adapted_linear, adapted_experts: of those under the adapter.
        num_experts: in a tensor of experts, 0 without such.
        not_adapted: what could be adapted and is not, in words.
    """

    trained: int
    what: str
    own: int
    own_linear: int
    trained_on_experts: int
    rank: int
    targets: Targets
    linear: int
    experts: int
    other: int
    quantized: int
    quantization: str
    dtype: str
    adapted_linear: int
    adapted_experts: int
    num_experts: int
    not_adapted: tuple[str, ...]

    @property
    def frozen(self) -> int:
        """All of the base that does not learn."""
        return self.linear + self.experts + self.other - self.own

    @property
    def adapter(self) -> int:
        """Those of the adapter."""
        return self.trained - self.own

    def describe(self) -> str:
        """The line."""
        if not self.frozen:
            return f"{self.trained:,} trained ({self.what})"
        what, adapted = self.what, self.adapted_linear + self.adapted_experts
        if adapted:
            what += f", over {short_count(adapted)} of the base"
        left = f"; not adapted: {', '.join(self.not_adapted)}" if self.not_adapted else ""
        return f"{self.trained:,} trained ({what}); {short_count(self.frozen)} frozen{self._held()}{left}"

    def _held(self) -> str:
        """How many of the frozen ones are held in which precision, and of which parts those in full precision are."""
        if self.quantization == "none":
            return f" in {self.dtype}"
        size = self.experts * getattr(torch, self.dtype).itemsize / _GIB
        parts = {
            f"experts {short_count(self.experts)}: {size_text(size)}": self.experts,
            f"linear layers {short_count(self.linear - self.quantized)}": self.linear - self.quantized,
            f"embeddings, head and norms {short_count(self.other)}": self.other,
        }
        said = "; ".join(part for part, number in parts.items() if number)
        quantized = f"{short_count(self.quantized)} in {self.quantization}, " if self.quantized else ""
        return f": {quantized}{short_count(self.frozen - self.quantized)} in {self.dtype} ({said})"


def count_parameters(
    model: PreTrainedModel, tuning: LoraConfig | FullConfig | PartialConfig, quantization: str, dtype: torch.dtype
) -> Parameters:
    """Count what is there and what will learn.

    Args:
        model: the base without an adapter, loaded or on the meta device.
        tuning: what is trained.
        quantization: asked for; a loaded model shows which layers are quantized.
        dtype: of the weights that are not quantized.

    Raises:
        ConfigError: a target or a part names nothing in the model.
    """
    layers, tensors = linear_layers(model), expert_tensors(model)
    learns = _LEARNS[type(tuning)](model, tuning)
    found, own = learns.targets, learns.own
    head = head_of(model)
    modules = dict(model.named_modules())
    body = {name: ins * outs for name, (ins, outs) in layers.items() if modules[name] is not head}
    counted = {id(modules[name].weight) for name in body} | {id(tensor) for tensor in tensors.values()}
    other = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in counted)
    experts = sum(tensor.numel() for tensor in tensors.values())
    in_few_bits = {name for name in body if type(modules[name]).__name__ in ("Linear4bit", "Linear8bitLt")}
    if not in_few_bits and quantization != "none":
        in_few_bits = set(body)
    return Parameters(
        trained=learns.adapter + sum(parameter.numel() for parameter in own),
        what=learns.what,
        own=sum(parameter.numel() for parameter in own),
        own_linear=sum(parameter.numel() for parameter in own if id(parameter) in counted),
        trained_on_experts=adapter_parameters(model, Targets((), found.experts), learns.rank),
        rank=learns.rank, targets=found,
        linear=sum(body.values()), experts=experts, other=other, quantized=sum(body[name] for name in in_few_bits),
        quantization=quantization, dtype=str(dtype).removeprefix("torch."),
        adapted_linear=sum(a * b for name, (a, b) in layers.items() if name in found.modules),
        adapted_experts=sum(tensors[name].numel() for name in found.experts),
        num_experts=max((len(tensor) for tensor in tensors.values()), default=0),
        not_adapted=() if learns.asked is None else tuple(
            _not_adapted(model, learns.asked, found, set(body), sum(body.values()) + experts + other)
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class _Learns:
    """What a tuning lets learn.

    Attributes:
        what: in words.
        own: weights of the model itself.
        targets, adapter, rank: of the adapter: what it is on, its parameters.
        asked: for which targets; None without an adapter.
    """

    what: str
    own: list[torch.nn.Parameter]
    targets: Targets = _NO_TARGETS
    adapter: int = 0
    rank: int = 0
    asked: str | Sequence[str] | None = None


def _lora(model: PreTrainedModel, tuning: LoraConfig) -> _Learns:
    found = find_targets(model, tuning.target_modules)
    on = [pluralize(len(found.modules), "module")] * bool(found.modules)
    on += [pluralize(len(found.experts), "expert tensor")] * bool(found.experts)
    what, number = f"LoRA r={tuning.rank} on {' and '.join(on)}", adapter_parameters(
        model, found, tuning.rank, tuning.use_dora
    )  # fmt: skip
    if tuning.modules_to_save:
        names = whole_modules(model, tuning.modules_to_save, found)
        whole = {parameter for name in names for parameter in model.get_submodule(name).parameters()}
        number += sum(parameter.numel() for parameter in whole)
        what += f", {', '.join(tuning.modules_to_save)} whole{_tied_note(model, whole)}"
    if (head := classifier_head(model)) is not None:
        number += sum(parameter.numel() for parameter in head.parameters())
        what += ", the new head"
    if tuning.new_tokens:
        tables = 1 if is_tied(model) else 2
        number += len(tuning.new_tokens) * model.get_input_embeddings().weight.shape[1] * tables
        what += f", {pluralize(len(tuning.new_tokens), 'new token')}"
    return _Learns(what, [], found, number, tuning.rank, tuning.target_modules)


def _full(model: PreTrainedModel, tuning: FullConfig) -> _Learns:
    return _Learns("every weight", [parameter for parameter in model.parameters() if parameter.is_floating_point()])


def _partial(model: PreTrainedModel, tuning: PartialConfig) -> _Learns:
    own = list(find_parameters(model, tuning.parts).values())
    parts = tuning.parts if isinstance(tuning.parts, str) else ", ".join(tuning.parts)
    return _Learns(f"{parts}{_tied_note(model, set(own))}", own)


def _tied_note(model: PreTrainedModel, trained: set[torch.nn.Parameter]) -> str:
    """What to say where a head is trained that is tied to the embeddings."""
    both = is_tied(model) and model.get_input_embeddings().weight in trained
    return "; head and embeddings are one weight" if both else ""


_LEARNS: dict[type, Callable[[PreTrainedModel, Any], _Learns]] = {
    LoraConfig: _lora, FullConfig: _full, PartialConfig: _partial,
}  # fmt: skip


def _not_adapted(
    model: PreTrainedModel, asked: str | Sequence[str], found: Targets, body: set[str], total: int
) -> list[str]:
    """What has no adapter: linear layers by the last part of their names, experts, routers, other matrices."""
    choosing, tensors, others = routers(model), expert_tensors(model), other_parts(model)
    left = set(others.values())
    if asked == ALL_LINEAR:
        left |= {name.rpartition(".")[2] for name in read_by_kernels(model)}
    known = {f"{name}.weight" for name in (*body, *choosing)} | tensors.keys()
    if asked != ALL_LINEAR:
        left |= {
            name.rpartition(".")[2]
            for name in body
            if name not in found.modules and name not in choosing and name not in others
        }
    outside = (model.get_input_embeddings(), head_of(model))
    embeddings = {id(p) for module in outside if module is not None for p in module.parameters()}
    left |= {
        name.removesuffix(".weight").rpartition(".")[2]
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and name not in known and id(parameter) not in embeddings and not name.endswith("bias")
        if left.isdisjoint(name.split("."))
    }
    missing = sum(tensor.numel() for name, tensor in tensors.items() if name not in found.experts)
    said = sorted(left) if len(left) <= 8 else [*sorted(left)[:7], f"{len(left) - 7} more"]
    said += ["router"] * bool(choosing)
    return said + ([f"experts ({missing / total:.0%} of the weights)"] if missing else [])


def short_count(number: int) -> str:
    """`12,345`, `2.9 M`, `30.5 B`."""
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number:,}"
