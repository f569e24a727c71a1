"""A base with an adapter in the memory of its stored dtype: one block at a time is dequantized, computed or merged.

    held = BlockWeights(peft_model)
    with held.in_dtype(torch.float32, dequantize=True): ...   # each decoder layer is fp32 while it runs, and only then
    for weights in held.merged(): ...                         # what the adapter changes, in fp32, block by block

A block is a decoder layer, or a module outside of them that has weights of its own (embedding, last norm, head).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from lmtune.errors import LmtuneError
from lmtune.kernels.lora_linear import BaseWeight
from lmtune.models.structure import base_of, trained_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_QUANTIZED = ("Linear4bit", "Linear8bitLt")  # bitsandbytes' layers, and PEFT's around them
_ADAPTERS = re.compile(r"(^|\.)(lora_|trainable_tokens_)")  # names of the adapter's own weights
_AROUND = re.compile(r"\.(base_layer|original_module|token_adapter|modules_to_save\.[^.]+)(?=\.|$)")  # by PEFT


class BlockWeights:
    """The blocks of one model.

    Attributes:
        base: the transformers model inside.
        blocks: each block, and whether the modules below it belong to it.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """`model` is a PeftModel in evaluation mode, or a transformers model."""
        self.base: PreTrainedModel = base_of(model)
        for module in self.base.modules():
            if hasattr(module, "lmtune_weight"):
                module.lmtune_weight.keep = False  # no dense copies beside the quantized weights
        _make_replaceable(self.base)
        self._names = {module: _AROUND.sub("", name) for name, module in self.base.named_modules()}
        self._whole = {  # trained in place of the base's own, by PEFT's `modules_to_save`
            part for module in self.base.modules() if hasattr(module, "modules_to_save")
            for part in trained_module(module).modules()
        }  # fmt: skip
        self._quantized = {f"{name}.weight" for module, name in self._names.items() if _is_quantized(module)}
        self._dtype: torch.dtype | None = None
        self._dequantize = False
        self._kept = self._update = 0.0
        self._restore: list[contextlib.ExitStack] = []
        self.blocks = list(_blocks(self.base))
        for block, whole in self.blocks:
            block.register_forward_pre_hook(lambda module, args, whole=whole: self._enter(module, whole))
            block.register_forward_hook(lambda *_: self._leave(), always_call=True)

    @contextlib.contextmanager
    def in_dtype(self, dtype: torch.dtype | None, dequantize: bool = False) -> Iterator[None]:
        """Compute with every weight in `dtype`, with `dequantize` quantized ones too; None keeps what is held."""
        before = self._dtype, self._dequantize
        self._dtype, self._dequantize = dtype, dequantize
        try:
            yield
        finally:
            self._dtype, self._dequantize = before

    def free_layers(self) -> None:
        """Free the layers; only the head can run after it."""
        for module in self.base.modules():
            if isinstance(module, torch.nn.ModuleList):
                for index in range(len(module)):
                    module[index] = torch.nn.Identity()
        self.blocks.clear()
        self._names.clear()

    def weight_names(self) -> list[str]:
        """The weights that merging changes, in the order of the model, by their names without adapter."""
        return [name for block, whole in self.blocks for name, _ in self._changed(block, whole)]

    def meta(self, name: str) -> torch.Tensor:
        """One weight of the base on the meta device, in its shape without quantization."""
        module = self._module(name.rpartition(".")[0])
        if self.is_quantized(name):
            return torch.empty(module.out_features, module.in_features, device="meta")
        return torch.empty(getattr(module, name.rpartition(".")[2]).shape, device="meta")

    @property
    def update_kept(self) -> float:
        """The share of the adapter's update, by its norm, that is left when `merged` weights are rounded as written."""
        return self._kept / self._update if self._update else 1.0

    @torch.no_grad()
    def merged(self, written: torch.dtype = torch.float32) -> Iterator[dict[str, torch.Tensor]]:
        """What the adapter changes and what was quantized, in fp32: a dict for each block, one block at a time.

        `written` is the dtype they will be rounded to, for `update_kept`.

        Raises:
            LmtuneError: a merged weight is not finite.
        """
        for block, whole in self.blocks:
            names = [name for name, _ in self._changed(block, whole)]
            if not names:
                continue
            with self._materialized(block, whole, torch.float32, dequantize=True):
                self._merge(block, written)
                yield {name: self.parameter(name).data for name in names}

    def parameter(self, name: str) -> torch.nn.Parameter:
        """A weight of the base by its name without adapter, as it is held at this moment."""
        owner, _, last = name.rpartition(".")
        found: torch.nn.Parameter = getattr(self._module(owner), last)
        return found

    def is_quantized(self, name: str) -> bool:
        """Whether a weight of this name is held in 4 or 8 bit while its block does not run."""
        return name in self._quantized

    def is_trained_whole(self, name: str) -> bool:
        """Whether a weight is not the base's but one trained in its place."""
        return self._module(name.rpartition(".")[0]) in self._whole

    def _module(self, name: str) -> Any:
        """The base's module of this name, or the one trained in its place, without the layers that PEFT put around."""
        module: Any = self.base
        for part in name.split(".") if name else ():
            module = _unwrapped(getattr(module, part))
        return module

    def _changed(self, block: Any, whole: bool) -> Iterator[tuple[str, Any]]:
        """(name, module) of every weight in a block that merging writes anew."""
        from peft.tuners.lora import LoraLayer
        from peft.tuners.trainable_tokens import TrainableTokensLayer

        found = set()
        for module in block.modules() if whole else (block,):
            if module in self._whole:
                base, parts = module, [name for name, _ in module.named_parameters(recurse=False)]
            elif isinstance(module, (LoraLayer, TrainableTokensLayer)):
                base = _unwrapped(module)
                parts = [getattr(module, "parameter_name", "weight")]
                parts += ["bias"] * any(getattr(module, "lora_bias", {}).values())
            elif _is_quantized(module):
                base, parts = module, ["weight"]
            else:
                continue
            for part in parts:
                if (name := f"{self._names[base]}.{part}") not in found:
                    found.add(name)
                    yield name, base

    def _merge(self, block: Any, written: torch.dtype) -> None:
        """Let PEFT add B A to the weights of a block in fp32; PEFT checks that the sum is finite."""
        from peft.tuners.lora import LoraLayer
        from peft.tuners.lora.layer import Linear
        from peft.tuners.trainable_tokens import TrainableTokensLayer

        for module in block.modules():
            if not isinstance(module, (LoraLayer, TrainableTokensLayer)) or module.merged:
                continue
            weight = getattr(_unwrapped(module), getattr(module, "parameter_name", "weight"))
            before = weight.data.clone()
            try:
                if any(kind.__name__ in _QUANTIZED for kind in type(module).__mro__):
                    Linear.merge(module, safe_merge=True)  # the layer's own method would quantize the sum again
                else:
                    module.merge(safe_merge=True)
            except ValueError as error:
                if "NaNs detected" not in str(error):
                    raise
                raise LmtuneError(
                    "the merged weights are not finite: the adapter's values are too large; nothing was kept; train it "
                    "again, with a smaller train.learning_rate"
                ) from error
            finally:
                module.merged_adapters.clear()  # the weights are put back
            update = weight.data - before
            self._update += float(update.square().sum(dtype=torch.float64))
            self._kept += float(((weight.data.to(written).float() - before) * update).sum(dtype=torch.float64))

    def _enter(self, block: Any, whole: bool) -> None:
        stack = contextlib.ExitStack()
        self._restore.append(stack)
        if self._dtype is not None:
            stack.enter_context(self._materialized(block, whole, self._dtype, self._dequantize))

    def _leave(self) -> None:
        self._restore.pop().close()

    @contextlib.contextmanager
    def _materialized(self, block: Any, whole: bool, dtype: torch.dtype, dequantize: bool) -> Iterator[None]:
        """The block's base weights in `dtype` inside, and as they were afterwards."""
        kept, layers = [], []
        if dequantize:
            for parent in block.modules() if whole else ():
                for name, child in parent.named_children():
                    if _is_quantized(child):
                        layers.append((parent, name, child))
            for parent, name, child in layers:
                setattr(parent, name, _dequantized(child, self.base.dtype, dtype))
        for name, tensor in (*block.named_parameters(recurse=whole), *block.named_buffers(recurse=whole)):
            if tensor.is_floating_point() and not _ADAPTERS.search(name):
                kept.append((tensor, tensor.data))
                if tensor.dtype.itemsize < 4 or isinstance(tensor, torch.nn.Parameter):
                    tensor.data = tensor.data.to(dtype)
        try:
            yield
        finally:
            for tensor, data in kept:
                tensor.data = data
            for parent, name, child in layers:
                setattr(parent, name, child)


def _dequantized(layer: Any, compute_dtype: torch.dtype, dtype: torch.dtype) -> torch.nn.Linear:
    """A plain layer in `dtype` with the weights of a quantized one, which was trained over in `compute_dtype`."""
    with torch.device("meta"):
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    weight = BaseWeight(layer).dense(compute_dtype).to(dtype)
    plain.weight = torch.nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        plain.bias = torch.nn.Parameter(layer.bias.data.to(dtype), requires_grad=False)
    return plain


def recompute_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that are not stored, such as rotary frequencies, in fp32: a load in 16 bit rounds them."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        whole = type(model)(model.config)
    computed = dict(whole.named_non_persistent_buffers())
    for name, module in model.named_modules():
        for last in module._non_persistent_buffers_set:
            exact = computed.get(_AROUND.sub("", f"{name}.{last}".lstrip(".")))
            held = module._buffers.get(last)
            if exact is not None and held is not None and held.is_floating_point() and exact.device.type != "meta":
                module._buffers[last] = exact.to(held.device)


def _is_quantized(module: Any) -> bool:
    """Whether a linear layer is bitsandbytes' own: its weight holds codes."""
    return type(module).__name__ in _QUANTIZED and not _is_tuner(module)


def _unwrapped(module: Any) -> Any:
    """The base's module inside PEFT's layers around it."""
    module = trained_module(module)
    while _is_tuner(module) or isinstance(module, _Replaceable):
        module = module.base_layer
    return module


def _is_tuner(module: Any) -> bool:
    """Whether it is PEFT's layer around one of the base's."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


class _Replaceable(torch.nn.Module):
    """Around a quantized layer outside of the decoder layers, so that a dense one can replace it while it runs."""

    def __init__(self, base_layer: torch.nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer."""
        return self.base_layer(*args, **kwargs)


def _make_replaceable(module: Any) -> None:
    for name, child in list(module.named_children()):
        if isinstance(module, torch.nn.ModuleList) or _is_tuner(child):
            continue
        if _is_quantized(child):
            setattr(module, name, _Replaceable(child))
        else:
            _make_replaceable(child)


def _blocks(module: Any) -> Iterator[tuple[Any, bool]]:
    """(block, whether all below it belongs to it); each weight of the model is in one."""
    if _is_tuner(module) or isinstance(module, _Replaceable):
        yield module, True
        return
    if any(True for own in (module.parameters, module.buffers) for _ in own(recurse=False)):
        yield module, False
    for child in module.children():
        if isinstance(module, torch.nn.ModuleList):
            yield child, True
        else:
            yield from _blocks(child)
