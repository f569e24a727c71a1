"""A base model's folder, looked at before transformers reads it: whether each file is what its name says.

This costs the headers of the weights, so it comes before the data are read, and each problem is listed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lmtune.errors import ModelError, listed
from lmtune.models.config_checks import LAYERS, config_faults, settings_of
from lmtune.models.file_checks import generation_fault, odd_files, read_object, shapes_of, text_fault, weights_fault
from lmtune.models.weight_types import type_faults

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_GENERATION = "generation_config.json"
_JSON = ("config.json", _GENERATION, "tokenizer_config.json")
_TEMPLATE, _TOKENIZER = "chat_template.jinja", "tokenizer.json"
_SIZES = ("vocab_size", "hidden_size", "n_embd")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# What bitsandbytes stores beside quantised weights
_STORED = {"load_in_4bit": (4, re.compile(r"\.absmax$")), "load_in_8bit": (8, re.compile(r"\.SCB$"))}
_VOCABULARIES = (_TOKENIZER, "tokenizer.model", "vocab.json", "merges.txt")
ADAPTER = "adapter_config.json"
# Weights of other kinds, by how their names end: what holds them, and what to do
_OTHERS = {
    (".bin", ".pt", ".pth", ".bin.index.json"): (
        "pickled weights ({}), which can run code when read",
        "convert them with the safetensors tools, or ask its author",
    ),
    (".gguf",): ("weights for llama.cpp ({})", "use the model that they were made from"),
    (".h5", ".msgpack", ".ckpt"): ("weights for TensorFlow or Flax ({})", "ask its author for safetensors"),
}


def check_base(name: str, folder: Path, tokenizer_alone: bool = False) -> None:
    """Look at every file of a base model's folder.

    Args:
        name: the folder as `model.name` gives it.
        folder: where it is.
        tokenizer_alone: it need not hold weights.

    Raises:
        ModelError: with everything that is wrong with it.
    """
    if not (folder / "config.json").exists() and not (folder / "config.json").is_symlink():
        adapter = (folder / ADAPTER).is_file()
        what = "it is an adapter; give the base model that it was trained over" if adapter else "it is no model folder"
        raise ModelError(f"model.name: {name} holds no config.json, so {what}")
    if odd := odd_files(folder):
        raise _error(name, odd)
    if _is_there(folder / ADAPTER):
        raise adapter_beside(name)
    stored = any(_is_there(folder / file) for file in (WEIGHTS, INDEX))
    if not stored and not tokenizer_alone:
        raise ModelError(f"model.name: {name} holds {_instead(folder)}")
    problems = [*_text_faults(folder), *(_weights_faults(folder) if stored else ())]
    problems = problems or list(config_faults(read_object(folder / "config.json")))
    if problems := problems or (_stored_faults(folder) if stored else []):
        raise _error(name, problems)


def adapter_beside(name: str) -> ModelError:
    """For a model with an adapter in its folder: transformers would load another base, and the adapter on it."""
    return ModelError(
        f"model.name: {name} holds an adapter ({ADAPTER}) beside the model, and transformers would load the base that "
        "it names; take the adapter away to train over the model alone, or merge it first"
    )


def tokenizer_fault(folder: Path) -> str | None:
    """What is wrong with the vocabulary of a tokenizer that could not be loaded, if that can be told."""
    try:
        json.loads((folder / _TOKENIZER).read_bytes())
    except OSError:
        return None
    except (ValueError, RecursionError) as error:
        return f"{_TOKENIZER}: not valid JSON ({error}); copy or download it again"
    return None


def check_weights(name: str, folder: Path) -> None:
    """Look at the weights in a folder that is not the user's, the Hub's cache, once they are there.

    Raises:
        ModelError: with everything that is wrong with them.
    """
    problems = list(_weights_faults(folder)) or list(config_faults(read_object(folder / "config.json")))
    if problems := problems or _stored_faults(folder):
        raise _error(name, problems)


def _error(name: str, problems: list[str]) -> ModelError:
    said = f" {problems[0]}" if len(problems) == 1 else f"\n{listed(problems)}"
    return ModelError(f"model.name: {name}:{said}")


def _weights_faults(folder: Path) -> Iterator[str]:
    if _is_there(folder / WEIGHTS):
        shards = [WEIGHTS]
    else:
        try:
            shards = _shards(folder / INDEX)
        except ModelError as error:
            yield str(error)
            return
    for shard in shards:
        if not _is_there(folder / shard):
            yield f"{shard}, which {INDEX} names, is missing; download it too"
        elif fault := weights_fault(folder / shard):
            yield fault


def _stored_faults(folder: Path) -> list[str]:
    """What is wrong between a config and weights that can be read."""
    config = read_object(folder / "config.json")
    settings = settings_of(config)
    files = [WEIGHTS] if _is_there(folder / WEIGHTS) else _shards(folder / INDEX)
    return list(_header_faults(folder, files, settings)) or list(type_faults(folder, files, settings))


def _header_faults(folder: Path, files: list[str], settings: Mapping[str, Any]) -> Iterator[str]:
    """What the config says that the weights' header denies: sizes, whose model would take hours to build, and bits."""
    shapes = {name: shape for file in files for name, shape in shapes_of(folder / file).items()}
    quantization = settings.get("quantization_config")
    for key, (bits, mark) in _STORED.items():
        if isinstance(quantization, dict) and quantization.get(key) and not any(mark.search(name) for name in shapes):
            yield (
                f"config.json says that the weights are stored in {bits} bit (quantization_config), but they are not; "
                "take that key away, or download the weights again"
            )
    layers = 1 + max((int(number) for name in shapes for number in _NUMBER.findall(name)), default=-1)
    width = max((size for shape in shapes.values() for size in shape), default=0)
    for keys, most, who in ((LAYERS, layers, "the weights have"), (_SIZES, width, "the largest of the weights has")):
        for key in keys:
            if isinstance(settings.get(key), int) and most and settings[key] > most:
                yield f"config.json: {key} is {settings[key]:,}, but {who} {most:,}; copy or download both again"


def _shards(index: Path) -> list[str]:
    """The files that an index names, in order."""
    if fault := text_fault(index):
        raise ModelError(fault)
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ModelError(f"{INDEX} holds no weight_map of file names; copy or download it again")
    shards = sorted(set(places.values()))
    if strange := [name for name in shards if Path(name).name != name]:
        raise ModelError(f"{INDEX} names {strange[0]}, which is no file name; copy or download it again")
    return shards


def _text_faults(folder: Path) -> Iterator[str]:
    for name in _JSON:
        if _is_there(folder / name):
            if fault := text_fault(folder / name):
                yield fault
                continue
            try:
                read_object(folder / name)
            except ModelError as error:
                yield str(error)
                continue
            if name == _GENERATION and (fault := generation_fault(folder / name)):
                yield fault
    for name in _VOCABULARIES:
        if _is_there(folder / name) and (fault := text_fault(folder / name, "a vocabulary")):
            yield fault
    template = folder / _TEMPLATE
    if template.is_file() and template.stat().st_size:  # an empty one is none
        if fault := text_fault(template, "a template"):
            yield fault
        try:
            template.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            yield f"{_TEMPLATE}: not UTF-8 (byte {error.start}); save it as UTF-8"


def _is_there(path: Path) -> bool:
    """Whether there is such a file, or a link to one that is missing."""
    return path.is_file() or path.is_symlink()


def _instead(folder: Path) -> str:
    """What a folder without weights that lmtune reads holds in their place, and what to do."""
    names = sorted(path.name for path in folder.iterdir())
    if others := [name for name in names if name.endswith(".safetensors")]:
        return f"{others[0]}, but neither {WEIGHTS} nor {INDEX}, which names the files; download the whole model"
    for ends, (what, advice) in _OTHERS.items():
        if found := [name for name in names if name.endswith(ends)]:
            return f"{what.format(found[0])}; lmtune reads safetensors only: {advice}"
    return f"no {WEIGHTS}; lmtune reads safetensors only: download the weights too"
