"""The types in which a base's weights are stored: numbers that training can start from, or codes for such.

transformers turns whole numbers and 8-bit floats into the floats of its model without a word. Without the scales of
whoever made them they mean nothing, so they need a `quantization_config`, which says how they are read. Masks and the
numbers of positions, which old files hold beside the weights, may be of any type.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lmtune.models.file_checks import types_of

_FLOATS = ("F64", "F32", "F16", "BF16")


def type_faults(folder: Path, files: Iterable[str], settings: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the types in the headers of a base's weights, and what to do about it.

    Args:
        folder: the base's.
        files: its safetensors files.
        settings: what its config.json says.
    """
    if settings.get("quantization_config") or settings.get("compression_config"):
        return
    types = {file: types_of(folder / file) for file in files}
    if all(kind in _FLOATS for kinds in types.values() for kind in kinds.values()):
        return
    weights = _weight_names(folder)
    for file, kinds in types.items():
        found = sorted(name for name, kind in kinds.items() if kind not in _FLOATS and _is_among(name, weights))
        if found:
            more = f" and {len(found) - 1} more are" if len(found) > 1 else " is"
            yield (
                f"{file}: {found[0]}{more} of type {kinds[found[0]]}, but config.json has no quantization_config that "
                f"says how it is read; use the model with weights in {', '.join(_FLOATS[:-1])} or {_FLOATS[-1]}"
            )


def empty_model(path: str | Path, revision: str | None = None) -> Any:
    """The model that a config.json describes, without memory for its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _weight_names(folder: Path) -> list[str]:
    """The model's weights; none where no model can be made of its config, which loading says better."""
    try:
        model = empty_model(folder)
    except Exception:
        return []
    return [name for name, weight in model.named_parameters() if weight.is_floating_point()]


def _is_among(name: str, weights: list[str]) -> bool:
    """Whether a stored name is that of a weight: files may leave out the first parts of a name, or have more."""
    return any(f".{name}".endswith(f".{weight}") or f".{weight}".endswith(f".{name}") for weight in weights)
