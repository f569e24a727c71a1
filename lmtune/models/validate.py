"""Can this folder be used as a base model? Each problem is one line: the file, what is wrong, what to do.

    check_base("./qwen", Path("qwen"))   # before loading: each file by its first bytes, the weights by their headers
    check_loaded(config, model, info)    # after loading: missing weights, other shapes, NaN

The first costs milliseconds, so it comes before the data are tokenized. What it does not see, transformers reports when
it loads, and `check_loaded` finds what transformers only warns of. An adapter folder is checked by
`lmtune.models.tuning.adapter_files`, with the same readers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmtune.config.schema import ModelConfig
from lmtune.errors import ModelError, is_failure
from lmtune.io.console import warn
from lmtune.io.text import format_list

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
_JSON = (CONFIG, "generation_config.json", "tokenizer_config.json")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
_TEMPLATE = "chat_template.jinja"
_PICKLES = (".bin", ".pt", ".pth", ".bin.index.json")
_FLOATS = ("F64", "F32", "F16", "BF16")
_DOWNLOAD = "download the file itself, for example with `hf download`"
# How files begin that are found in place of others, in lower case
_IN_PLACE = {
    b"version https://git-lfs": "a Git LFS pointer",
    b"<!doctype": "a web page",
    b"<html": "a web page",
    b"<?xml": "a web page",
}
# What bitsandbytes stores beside quantized weights
_QUANTIZED_BY = {"load_in_4bit": ("4-bit", ".absmax"), "load_in_8bit": ("8-bit", ".SCB")}
_TEXT = "Hello, 12 plain words of text"


# --- before loading


def check_base(name: str, folder: Path, tokenizer_only: bool = False) -> None:
    """Look at the files of a base model's folder.

    Args:
        name: the folder as `model.name` gives it.
        folder: where it is.
        tokenizer_only: whether the weights may be absent.

    Raises:
        ModelError: with every problem.
    """
    if _exists(folder / CONFIG) and _exists(folder / ADAPTER_CONFIG):
        raise adapter_beside(name)
    _require_none(name, _base_problems(folder, tokenizer_only))


def check_weights(name: str, folder: Path) -> None:
    """Look at the weights in the Hub's cache once they are there.

    Raises:
        ModelError: with every problem.
    """
    _require_none(name, list(_weight_problems(folder)) or list(_type_problems(folder)))


def adapter_beside(name: str) -> ModelError:
    """The error for an adapter in a model's folder: transformers would load the base that the adapter names."""
    return ModelError(
        f"model.name: {name}: {ADAPTER_CONFIG} beside the model; transformers would load the base that this adapter "
        "names; remove the adapter, or merge it first"
    )


def _require_none(name: str, problems: Sequence[str]) -> None:
    if problems:
        text = f" {problems[0]}" if len(problems) == 1 else f"\n{format_list(problems)}"
        raise ModelError(f"model.name: {name}:{text}")


def _base_problems(folder: Path, tokenizer_only: bool) -> list[str]:
    if not _exists(folder / CONFIG):
        is_adapter = _exists(folder / ADAPTER_CONFIG)
        fix = "it is an adapter; give the base model that it was trained over" if is_adapter else "give a model folder"
        return [f"no {CONFIG}; {fix}"]
    has_weights = _exists(folder / WEIGHTS) or _exists(folder / INDEX)
    if not has_weights and not tokenizer_only:
        return [_other_weights(folder)]
    problems = [*_text_problems(folder), *(_weight_problems(folder) if has_weights else ())]
    return problems or (list(_type_problems(folder)) if has_weights else [])


def _other_weights(folder: Path) -> str:
    """What a folder without usable weights holds instead, and what to do."""
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        if name.endswith(".safetensors"):
            return f"{name} without {INDEX}; download the whole model"
        if name.endswith(_PICKLES):
            return f"{name}: pickled weights can run code; expected safetensors; convert them, or ask the author"
        if name.endswith(".gguf"):
            return f"{name}: weights for llama.cpp; expected safetensors; use the model that they were made from"
    return f"no {WEIGHTS}; lmtune reads safetensors only; download the weights too"


def _text_problems(folder: Path) -> Iterator[str]:
    for name in _JSON:
        try:
            if _exists(folder / name):
                read_object(folder / name)
        except ModelError as error:
            yield str(error)
    for name in (*_VOCABULARIES, _TEMPLATE):
        path = folder / name
        if _exists(path) and (problem := text_problem(path, "a template" if name == _TEMPLATE else "a vocabulary")):
            yield problem
        elif name == _TEMPLATE and path.is_file():
            try:
                path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                yield f"{name}: not UTF-8 (byte {error.start}); save it as UTF-8"


def _weight_problems(folder: Path) -> Iterator[str]:
    try:
        shards = _shards(folder)
    except ModelError as error:
        yield str(error)
        return
    for shard in shards:
        if not _exists(folder / shard):
            yield f"{shard}: missing, but {INDEX} names it; download it too"
        elif problem := weights_problem(folder / shard):
            yield problem


def _shards(folder: Path) -> list[str]:
    """The names of the safetensors files, in order."""
    if _exists(folder / WEIGHTS):
        return [WEIGHTS]
    places = read_object(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ModelError(f"{INDEX}: no weight_map of file names; download it again")
    if foreign := [name for name in places.values() if Path(name).name != name]:
        raise ModelError(f"{INDEX}: {foreign[0]}; expected a file name; download it again")
    return sorted(set(places.values()))


def _type_problems(folder: Path) -> Iterator[str]:
    """Where the types in the headers contradict `quantization_config`: transformers would read codes as weights."""
    config = read_object(folder / CONFIG)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]  # a vision model has `text_config`
    keys = ("quantization_config", "compression_config")
    quantization = next((part[key] for part in parts for key in keys if part.get(key)), None)
    types = {file: _types_of(folder / file) for file in _shards(folder)}
    if isinstance(quantization, dict):
        for key, (bits, ending) in _QUANTIZED_BY.items():
            if quantization.get(key) and not any(name.endswith(ending) for found in types.values() for name in found):
                yield (
                    f"{CONFIG}: quantization_config says {bits} weights, but they are not; remove that key, or "
                    "download the weights again"
                )
    if quantization:
        return
    for file, found in types.items():
        wrong = sorted(n for n, kind in found.items() if kind not in _FLOATS and n.endswith(".weight"))
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            yield (
                f"{file}: {wrong[0]}{more} has type {found[wrong[0]]}, and {CONFIG} has no quantization_config; "
                f"expected {', '.join(_FLOATS)}; use the model with weights of such a type"
            )


def _types_of(path: Path) -> dict[str, str]:
    """The type of each tensor as the header spells it, by name."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return {name: str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118 - not a dict


# --- after loading


def check_loaded(model: ModelConfig, loaded: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Refuse what transformers only warns of; warn of what it does not mention.

    Args:
        model: what was asked for.
        loaded: the transformers model.
        info: which weights were missing, unexpected, or of another shape (`output_loading_info`).

    Raises:
        ModelError: weights are missing, of other shapes, or not finite; or an adapter came with them.
    """
    name = model.name
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise adapter_beside(name)
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"model.name: {name}: weights are missing that {CONFIG} asks for; download it again, or use a causal "
            f"language model\n{format_list(missing, 8)}"
        )
    if others := sorted(info["mismatched_keys"]):
        lines = [f"{key}: {list(stored)}; expected {list(wanted)}" for key, stored, wanted in others]
        raise ModelError(
            f"model.name: {name}: shapes of the weights differ from {CONFIG}; download both again\n"
            f"{format_list(lines, 8)}"
        )
    if broken := [key for key, weight in loaded.named_parameters() if not _is_finite(weight)]:
        fix = "; or set a model.dtype with a larger range" if model.dtype == "float16" else ""
        raise ModelError(
            f"model.name: {name}: weights hold NaN or infinity; download it again{fix}\n{format_list(broken, 8)}"
        )
    if unused := sorted(info["unexpected_keys"]):
        warn(
            f"model.name: {name}: {len(unused)} weights are not used, such as {unused[0]}; check that {CONFIG} belongs "
            "to this model"
        )
    stored = _stored_quantization(loaded)
    if stored != model.quantization:
        warn(f"model.quantization: {model.quantization} is overruled: {name} is stored in {stored}")


def _is_finite(weight: torch.Tensor) -> bool:
    """Whether a weight has only finite values; of a quantized one, its scales. 0.4 s for 1e9 on a CPU.

    Unlike `isfinite`, `aminmax` needs no memory, and is 20 times as fast.
    """
    state = getattr(weight, "quant_state", None)
    parts = (weight.detach(), getattr(state, "absmax", None), getattr(state, "offset", None))
    return all(
        bool(torch.isfinite(end))
        for part in (*parts, getattr(weight, "SCB", None))
        if isinstance(part, torch.Tensor) and part.dtype.itemsize > 1 and part.is_floating_point() and part.numel()
        for end in part.aminmax()
    )


def _stored_quantization(loaded: PreTrainedModel) -> str:
    if (quantizer := getattr(loaded, "hf_quantizer", None)) is None:
        return "none"
    settings = quantizer.quantization_config.to_dict()
    if settings.get("load_in_8bit"):
        return "int8"
    return str(settings["bnb_4bit_quant_type"] if settings.get("load_in_4bit") else settings.get("quant_method"))


def tokenizer_problem(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why a tokenizer cannot encode text, or None: one without vocabulary would train on unknown tokens alone."""
    try:
        ids = tokenizer.encode(_TEXT, add_special_tokens=False)
    except BaseException as error:
        if not is_failure(error):
            raise
        return f"the tokenizer cannot encode plain text ({error}); download it again"
    return None if len(set(ids)) > 1 else f"the tokenizer has no tokens for {_TEXT!r}; download it again"


# --- single files, of a base model or an adapter


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ModelError: the file holds something else; begins with its name.
    """
    if problem := text_problem(path, "JSON"):
        raise ModelError(problem)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name}: not valid JSON ({error})") from None
    if not isinstance(tree, dict):
        raise ModelError(f"{path.name}: {type(tree).__name__}; expected an object")
    return tree


def text_problem(path: Path, kind: str) -> str | None:
    """Why a file cannot hold text of some `kind`, or None."""
    if path.is_symlink() and not path.exists():
        return f"{path.name}: the target of this link is missing; copy the file itself"
    with path.open("rb") as file:
        start = file.read(512)
    if not start and path.name != _TEMPLATE:
        return f"{path.name}: empty; download it again"
    found = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    what = next((what for begin, what in _IN_PLACE.items() if found.startswith(begin)), None)
    return f"{path.name}: {what}; expected {kind}; {_DOWNLOAD}" if what else None


def weights_problem(path: Path) -> str | None:
    """Why a file cannot be read as safetensors, or None."""
    from safetensors import SafetensorError, safe_open

    if problem := text_problem(path, "weights"):
        return problem
    try:
        with safe_open(path, framework="numpy"):
            return None
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            if file.read(2).startswith((b"PK", b"\x80")):
                return f"{path.name}: pickled weights can run code; expected safetensors; ask the author for them"
        return f"{path.name}: damaged or cut off ({error}); download it again"


def _exists(path: Path) -> bool:
    """Whether there is such a file, or a link whose target is missing."""
    return path.is_file() or path.is_symlink()
