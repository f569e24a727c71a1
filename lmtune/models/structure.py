"""Facts about a transformers model, found without knowing its name: base, layers, head, norms, experts, positions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmtune.models.head import Head, classifier_head, is_classifier

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def empty_model(path: str | Path, revision: str | None = None, head: Head | None = None) -> PreTrainedModel:
    """The model that a config.json describes, on the meta device; with `head` a classifier over its body."""
    config, kind = config_and_class(path, revision, head)
    with torch.device("meta"):
        model: PreTrainedModel = kind.from_config(config, trust_remote_code=False)
        return model


def config_and_class(path: str | Path, revision: str | None = None, head: Head | None = None) -> tuple[Any, Any]:
    """The config of a stored model, and transformers' class that loads it; with `head` those of a classifier."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    if head is not None:
        head.describe(config)
    is_language_model = head is None and not is_classifier(config)
    return config, AutoModelForCausalLM if is_language_model else AutoModelForSequenceClassification


def base_of(model: Any) -> PreTrainedModel:
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def max_positions(model: torch.nn.Module) -> int | None:
    """The longest sequence that the model was made for, if its config says so."""
    limit = getattr(base_of(model).config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList | None:
    """The list of as many modules as the model has layers, or None where it is not the only one."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    return lists[0] if len(lists) == 1 or (lists and count > 1) else None


def is_streamed(base: torch.nn.Module) -> bool:
    """Whether the layers of a transformers model come and go (`lmtune.models.offload`)."""
    return hasattr(base, "lmtune_stream")


def head_of(model: PreTrainedModel) -> torch.nn.Module | None:
    """The head of a language model, or `score` of a classifier; None where neither is told apart."""
    embeddings: torch.nn.Module | None = model.get_output_embeddings()
    return classifier_head(model) if embeddings is None else embeddings


def heads(model: PreTrainedModel) -> list[torch.nn.Module]:
    """What turns hidden states into the result: the head of a language model, `score` of a classifier."""
    if (head := head_of(model)) is not None:
        return [head]
    body = model.base_model
    return [part for part in model.children() if part is not body and any(True for _ in part.parameters())]


def trained_module(module: Any) -> Any:
    """The module that runs inside PEFT's wrapper for modules that are trained whole or in some rows, or `module`."""
    active = getattr(module, "modules_to_save", None)
    if active is not None and not module.disable_adapters and module.active_adapters:
        return active[module.active_adapters[0]]
    return getattr(module, "original_module", module)


def embeddings(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The tables of tokens, and of positions where the model has one."""
    return [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]


def norms(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The normalization layers that have weights: one number for each channel."""
    return [
        module for module in model.modules()
        if "norm" in type(module).__name__.lower() and (own := list(module.parameters()))
        and all(parameter.dim() == 1 for parameter in own)
    ]  # fmt: skip


def linear_layers(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each linear layer by full name, the head, quantized layers and GPT-2's `Conv1D` included.

    The model has no adapter.
    """
    from transformers.pytorch_utils import Conv1D

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            found[name] = int(module.nx), int(module.nf)
        elif name and hasattr(module, "in_features"):
            found[name] = int(module.in_features), int(module.out_features)
    return found


def expert_tensors(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The 3-D parameters `[E, …, …]` that hold the weights of all `E` experts of a layer, by full name."""
    return {
        f"{name}.{leaf}": parameter
        for name, module in model.named_modules()
        if isinstance(getattr(module, "num_experts", None), int)
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and len(parameter) == module.num_experts
    }
