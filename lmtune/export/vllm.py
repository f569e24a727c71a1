"""An adapter for vLLM: its folder, with names that vLLM finds, and the command that serves it.

vLLM leaves out weights whose names it does not know without a word, and answers as the base. So what it cannot hold is
refused here, and the names are those of the model class that it runs: where the base is published as a model of
pictures and text, of which lmtune trains the text part, the layers have another path.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from lmtune.errors import ModelError
from lmtune.models.tuning.adapter_files import CONFIG, WEIGHTS, check_adapter

TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that `--max-lora-rank` takes
_TEXT, _WRAPPED = "base_model.model.model.layers.", "base_model.model.model.language_model.layers."


def check_servable(folder: Path) -> int:
    """The rank of the adapter in `folder`, of PEFT.

    Raises:
        ModelError: it learns what vLLM does not serve beside a base.
    """
    settings: Mapping[str, Any] = check_adapter(folder)
    beyond = {
        "use_dora": "DoRA", "modules_to_save": "modules_to_save", "trainable_token_indices": "new tokens",
        "target_parameters": "LoRA on experts", "rank_pattern": "ranks of their own for some layers",
        "alpha_pattern": "alphas of their own for some layers",
    }  # fmt: skip
    if held := [what for key, what in beyond.items() if settings.get(key)]:
        raise ModelError(f"{folder}: vLLM does not serve {' and '.join(held)} as an adapter; serve the merged model")
    return int(settings["r"])


def write_adapter(folder: Path, target: Path, base_architecture: str) -> int:
    """Copy the adapter in `folder` to `target` in the form that vLLM reads.

    Args:
        folder: of PEFT.
        target: an empty folder.
        base_architecture: the class that the base's config names, which is what vLLM runs.

    Returns:
        How many tensors got other names.

    Raises:
        ModelError: the adapter learns what vLLM does not serve beside a base.
    """
    check_servable(folder)
    weights, renamed = load_file(folder / WEIGHTS), 0
    if base_architecture.endswith("ForConditionalGeneration"):
        names = {name: name.replace(_TEXT, _WRAPPED, 1) for name in weights}
        renamed = sum(name != new for name, new in names.items())
        weights = {names[name]: tensor for name, tensor in weights.items()}
    for path in folder.iterdir():
        if path.is_file() and path.name != WEIGHTS:
            shutil.copy2(path, target / path.name)
    save_file(weights, target / WEIGHTS, metadata={"format": "pt"})
    assert (target / CONFIG).is_file()
    return renamed


def fitting_rank(rank: int) -> int:
    """The least rank that vLLM knows which holds `rank`.

    Raises:
        ModelError: there is none.
    """
    fitting = next((known for known in _RANKS if known >= rank), None)
    if fitting is None:
        raise ModelError(f"rank {rank}: vLLM serves adapters up to rank {_RANKS[-1]}; serve the merged model")
    return fitting


def command(base: str, name: str, dtype: str) -> list[str]:
    """The words of the command line that serves the model `base` under `name`, computed in `dtype`."""
    return ["vllm", "serve", base, "--dtype", dtype, "--served-model-name", name]


def adapter_command(base: str, name: str, folder: Path, shown: str, dtype: str) -> list[str]:
    """The words of the command line that serves an adapter under `name` beside its base.

    vLLM takes template and end tokens from the base, unless it is told where those of training are.

    Args:
        base: what vLLM loads.
        name: by which requests call the adapter.
        folder: as `write_adapter` has written it.
        shown: that folder as the command names it.
        dtype: of the computation.

    Raises:
        ModelError: its rank is too high.
    """
    words = ["vllm", "serve", base, "--dtype", dtype, "--enable-lora", "--lora-modules", f"{name}={shown}"]
    words += ["--max-lora-rank", str(fitting_rank(check_servable(folder)))]
    if (folder / TEMPLATE).is_file():
        words += ["--chat-template", os.path.join(shown, TEMPLATE)]
    if (folder / GENERATION).is_file():
        words += ["--generation-config", shown]
    return words
