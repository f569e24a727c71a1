"""Can this folder be used as a base model? Each problem is one line: the file, what is wrong, what to do.

    check_base("./qwen", Path("qwen"))   # before loading: each file by its first bytes, the weights by their headers
    check_loaded(config, model, info)    # after loading: what transformers only warns of

The first costs milliseconds, so it comes before the data are tokenized.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

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
# How files begin that are found in place of others, in lower case
_IN_PLACE = {
    b"version https://git-lfs": "a Git LFS pointer",
    b"<!doctype": "a web page",
    b"<html": "a web page",
    b"<?xml": "a web page",
}
# What a folder without model.safetensors holds instead
_OTHER_WEIGHTS = {
    ".safetensors": f"without {INDEX}; download the whole model",
    ".bin": "pickled weights can run code; expected safetensors; convert them, or ask the author",
    ".pth": "pickled weights can run code; expected safetensors; convert them, or ask the author",
    ".gguf": "weights for llama.cpp, in one file with their config; name this file itself in model.name",
}
_FLOATS = ("F64", "F32", "F16", "BF16")
_TEXT = "Hello, 12 plain words of text"


def check_base(name: str, folder: Path, tokenizer_only: bool = False) -> None:
    """Look at the files of a base model's folder.

    Args:
        name: the folder as `model.name` gives it.
        folder: where it is.
        tokenizer_only: whether the weights may be absent.

    Raises:
        ModelError: with every problem.
    """
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    has_weights = (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()
    if not (folder / CONFIG).is_file():
        fix = "it is an adapter; give the base model that it was trained over" if is_adapter else "give a model folder"
        if files := sorted(folder.glob("*.gguf")):
            fix = f"name the GGUF file itself: {name.rstrip('/')}/{files[0].name}"
        raise ModelError(f"model.name: {name}: no {CONFIG}; {fix}")
    if is_adapter:
        raise adapter_beside(name)
    if not has_weights and not tokenizer_only:
        found = ((path.name, fix) for path in sorted(folder.iterdir()) for end, fix in _OTHER_WEIGHTS.items()
                 if path.name.endswith(end))  # fmt: skip
        other, fix = next(found, (f"no {WEIGHTS}", "lmtune reads safetensors only; download the weights too"))
        raise ModelError(f"model.name: {name}: {other}: {fix}")
    _require_none(name, [*_text_problems(folder), *(_weight_problems(folder) if has_weights else ())])
    if has_weights:
        _require_none(name, list(_type_problems(folder)))


def check_weights(name: str, folder: Path) -> None:
    """Look at the weights in the Hub's cache, as `check_base` does.

    Raises:
        ModelError: with every problem.
    """
    _require_none(name, list(_weight_problems(folder)))
    _require_none(name, list(_type_problems(folder)))


def adapter_beside(name: str) -> ModelError:
    """The error for an adapter in a model's folder: transformers would load the base that the adapter names."""
    return ModelError(
        f"model.name: {name}: {ADAPTER_CONFIG} beside the model; transformers would load the base that this adapter "
        "names; remove the adapter, or merge it first"
    )


def _require_none(name: str, problems: list[str]) -> None:
    if problems:
        text = f" {problems[0]}" if len(problems) == 1 else f"\n{format_list(problems)}"
        raise ModelError(f"model.name: {name}:{text}")


def _text_problems(folder: Path) -> Iterator[str]:
    for path in (folder / name for name in (*_JSON, *_VOCABULARIES)):
        if not path.is_file():
            continue
        try:
            if path.name in _JSON:
                read_object(path)
            elif problem := text_problem(path, "a vocabulary"):
                yield problem
        except ModelError as error:
            yield str(error)


def _weight_problems(folder: Path) -> Iterator[str]:
    try:
        shards = _shards(folder)
    except ModelError as error:
        yield str(error)
        return
    for shard in shards:
        if not (folder / shard).is_file():
            yield f"{shard}: missing, but {INDEX} names it; download it too"
        elif problem := weights_problem(folder / shard):
            yield problem


def _shards(folder: Path) -> list[str]:
    """The names of the weight files; ModelError if their index is damaged."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    places = read_object(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(n, str) and n == Path(n).name for n in places.values()):
        raise ModelError(f"{INDEX}: no weight_map from weights to files beside it; download it again")
    return sorted(set(places.values()))


def _type_problems(folder: Path) -> Iterator[str]:
    """Where the types in the headers contradict `quantization_config`: transformers would read codes as weights."""
    config = read_object(folder / CONFIG)
    parts = (config, *(part for part in config.values() if isinstance(part, dict)))  # a vision model has `text_config`
    quantization = next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)
    codes: dict[str, str] = {}
    for shard in _shards(folder):
        with safe_open(folder / shard, framework="pt") as file:
            kinds = {name: str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118 - not a dict
        codes |= {f"{shard}: {n}": kind for n, kind in kinds.items() if n.endswith("weight") and kind not in _FLOATS}
    if codes and quantization is None:
        name, kind = next(iter(codes.items()))
        yield f"{name}: {kind} weights, and {CONFIG} has no quantization_config; download both again"
    if isinstance(quantization, dict) and quantization.get("quant_method") == "bitsandbytes" and not codes:
        yield f"{CONFIG}: quantization_config says bitsandbytes, but no weight is quantized; remove that key"


def check_loaded(
    model: ModelConfig, loaded: PreTrainedModel, info: Mapping[str, Any], new_head: bool = False,
    holding: Callable[[torch.Tensor], contextlib.AbstractContextManager[None]] | None = None,
) -> None:  # fmt: skip
    """Refuse what transformers only warns of; warn of what it does not mention.

    Args:
        model: what was asked for.
        loaded: the transformers model.
        info: which weights were missing, unexpected, or of another shape (`output_loading_info`).
        new_head: it is to be a classifier, whose head may be another than the stored one.
        holding: has a weight in memory inside its block; None where all of them are.

    Raises:
        ModelError: weights are missing, of other shapes, or not finite; or an adapter came with them.
    """
    name = model.name
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise adapter_beside(name)
    fix = "; or set a model.dtype with a larger range" if model.dtype == "float16" else ""
    broken = []
    for key, weight in loaded.named_parameters():
        with contextlib.nullcontext() if holding is None else holding(weight):
            if not _is_finite(weight):
                broken.append(key)
    heads = ("score.", "lm_head.", "embed_out.") if new_head else ()
    missing, unused = (
        sorted(key for key in info[name] if not key.startswith(heads)) for name in ("missing_keys", "unexpected_keys")
    )
    mismatched = sorted(item for item in info["mismatched_keys"] if not item[0].startswith(heads))
    shapes = [f"{k}: {list(stored)}; expected {list(wanted)}" for k, stored, wanted in mismatched]
    for fault, keys in {
        f"weights are missing that {CONFIG} asks for; download it again, or use a causal language model": missing,
        f"shapes of the weights differ from {CONFIG}; download both again": shapes,
        f"weights hold NaN or infinity; download it again{fix}": broken,
    }.items():
        if keys:
            raise ModelError(f"model.name: {name}: {fault}\n{format_list(keys, 8)}")
    if unused:
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
    """Why a file cannot hold what is expected, such as `JSON`, or None."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return f"{path.name}: empty; download it again"
    found = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    what = next((what for begin, what in _IN_PLACE.items() if found.startswith(begin)), None)
    return what and f"{path.name}: {what}; expected {kind}; download the file itself, for example with `hf download`"


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
