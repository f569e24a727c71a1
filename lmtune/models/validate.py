"""A base model's folder, looked at before transformers reads it: whether each file is what its name says.

This costs the headers of the weights, so it comes before the data are read, and each problem is listed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lmtune.config.schema import ModelConfig
from lmtune.errors import ModelError, is_failure
from lmtune.io.console import warn
from lmtune.io.text import format_list, is_finite_number
from lmtune.models.structure import empty_model

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
    said = f" {problems[0]}" if len(problems) == 1 else f"\n{format_list(problems)}"
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


_MAX_JSON_BYTES = 10_000_000
_DOWNLOAD = "download the file itself"
_POINTER = ("a Git LFS pointer", f"{_DOWNLOAD}: `git lfs pull` in its folder, or `hf download`")
_PAGE = ("a web page", f"{_DOWNLOAD}, for example with `hf download`")
_PICKLE = ("pickled weights, which can run code when read", "lmtune reads safetensors only")
_POINTERS_AND_PAGES = (  # how files begin that are found in place of others, in small letters
    (b"version https://git-lfs", _POINTER), (b"<!doctype", _PAGE), (b"<html", _PAGE), (b"<?xml", _PAGE),
)  # fmt: skip
_READ = (".json", ".safetensors", ".jinja", ".model", "merges.txt", "vocab.txt")  # names of what libraries read
_PICKLES = ((b"pk", _PICKLE), (b"\x80", _PICKLE))


def unreachable(name: str) -> str | None:
    """Why the system can look for no file of this name: begins with the name, shortened. None if it can."""
    try:
        Path(name).exists()
    except OSError as error:
        return f"{name if len(name) <= 60 else name[:56] + '…'}: {error.strerror}"
    return None


def odd_files(folder: Path) -> list[str]:
    """What in a model's or an adapter's folder has a file's name and is none, and what to do about it.

    A library that opens a pipe waits for ever, and one that reads a device may never come to its end.
    """
    if not folder.is_dir():
        return []
    return [
        f"{path.name} is {'a folder' if path.is_dir() else 'a pipe or a device'}, not a file; put the file itself there"
        for path in sorted(folder.iterdir())
        if path.name.endswith(_READ) and path.exists() and not path.is_file()
    ]


def generation_fault(path: Path) -> str | None:
    """What is wrong with a generation_config.json and what to do about it, or None."""
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_dict(read_object(path))
    except ModelError as error:
        return str(error)
    except Exception as error:  # what its parts raise for values that they do not know is of any kind
        return f"{path.name}: cannot be used ({type(error).__name__}: {error}); correct it, or take it away"
    return None


def weights_fault(path: Path) -> str | None:
    """What keeps `path` from being read as safetensors and what to do about it, or None."""
    from safetensors import SafetensorError, safe_open

    if fault := _absence(path):
        return fault
    try:
        with safe_open(path, framework="numpy"):
            return None
    except (SafetensorError, OSError) as error:
        again = f"{path.name}: damaged or cut off ({error}); copy or download it again"
        return _in_place_of("weights", path, *_PICKLES) or again


def shapes_of(path: Path) -> dict[str, list[int]]:
    """The shape of each tensor in a safetensors file, by name; no weight is read."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict


def types_of(path: Path) -> dict[str, str]:
    """The type of each tensor in a safetensors file as its header spells it, by name; no weight is read."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return {name: str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118 - not a dict


def text_fault(path: Path, kind: str = "JSON") -> str | None:
    """What `path` is in place of text of some kind and what to do about it, or None."""
    return _absence(path) or _in_place_of(kind, path)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of moderate size.

    Raises:
        ModelError: it is no such file; begins with the file's name.
    """
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ModelError(f"{path.name}: {path.stat().st_size:,} bytes; a config has at most {_MAX_JSON_BYTES:,}")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(text_fault(path) or f"{path.name}: not valid JSON ({error})") from None
    if not isinstance(tree, dict):
        raise ModelError(f"{path.name}: holds {type(tree).__name__}, not an object")
    return tree


def _absence(path: Path) -> str | None:
    if path.is_symlink() and not path.exists():
        return f"{path.name} is a link to a file that is not there; copy the file itself"
    if path.is_file() and not path.stat().st_size:
        return f"{path.name} is empty; copy or download it again"
    return None


def _in_place_of(what: str, path: Path, *more: tuple[bytes, tuple[str, str]]) -> str | None:
    """That `path` is something else than `what`, if its beginning tells."""
    with path.open("rb") as file:
        head = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for start, (found, advice) in (*_POINTERS_AND_PAGES, *more):
        if head.startswith(start):
            return f"{path.name} is {found}, not {what}; {advice}"
    return None


_NUMBERS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_loaded(model: ModelConfig, loaded: Any, report: dict[str, Any]) -> None:
    """Make sure that the model is the one in the files; warn of what is odd about it.

    Args:
        model: what was asked for.
        loaded: what transformers made of it.
        report: its loading info.

    Raises:
        ModelError: weights are missing, of other shapes or no numbers, or an adapter came with them.
    """
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise adapter_beside(model.name)
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random numbers
        raise ModelError(
            f"model.name: {model.name} lacks weights that its config.json asks for; copy or download it again, or use "
            f"a causal language model\n{format_list(missing, 8)}"
        )
    if others := sorted(report["mismatched_keys"]):
        lines = [f"{name}: {list(stored)}, not {list(wanted)}" for name, stored, wanted in others]
        raise ModelError(
            f"model.name: {model.name}: the weights have other shapes than its config.json says; copy or download both "
            f"again\n{format_list(lines, 8)}"
        )
    if broken := [name for name, weight in loaded.named_parameters() if not _is_finite(weight)]:
        other = ", or set model.dtype, in which larger numbers fit" if model.dtype == "float16" else ""
        raise ModelError(
            f"model.name: {model.name}: weights hold NaN or infinity; copy or download it again{other}\n"
            f"{format_list(broken, 8)}"
        )
    if left := sorted(report["unexpected_keys"]):
        warn(
            f"model.name: {model.name} holds {len(left)} weights that its config.json has no place for, such as "
            f"{left[0]}; is it the config of another model?"
        )
    asked, stored = model.quantization, _held_in(loaded)
    if stored != asked:
        warn(f"model.quantization: {asked} is overruled: {model.name} is stored in {stored}, and is used like that")


def _is_finite(weight: torch.Tensor) -> bool:
    """Whether a weight holds numbers only; of a quantised one, whether its scales do. 0.4 s for 1e9 on a CPU.

    Unlike `isfinite`, `aminmax` needs no memory, and is 20 times as fast.
    """
    state = getattr(weight, "quant_state", None)
    numbers = (
        weight.detach(),
        *(getattr(state, name, None) for name in ("absmax", "offset")),
        getattr(weight, "SCB", None),
    )
    return all(
        bool(torch.isfinite(end))
        for part in numbers
        if isinstance(part, torch.Tensor) and part.dtype in _NUMBERS and part.numel()
        for end in part.aminmax()
    )


def _held_in(loaded: Any) -> str:
    """The quantization of a loaded model, whoever asked for it."""
    if (quantizer := getattr(loaded, "hf_quantizer", None)) is None:
        return "none"
    settings = quantizer.quantization_config.to_dict()
    if settings.get("load_in_8bit"):
        return "int8"
    return str(settings["bnb_4bit_quant_type"] if settings.get("load_in_4bit") else settings.get("quant_method"))


_TEXT = "Hello, 12 plain words of text"


def unusable(tokenizer: Any) -> str | None:
    """Why `tokenizer` cannot be used and what to do about it, or None."""
    length = tokenizer.model_max_length
    if not isinstance(length, (int, float)) or isinstance(length, bool) or not length >= 0:
        return f"tokenizer_config.json: model_max_length is {length!r}; should be a number above 0"
    try:
        ids = tokenizer.encode(_TEXT, add_special_tokens=False)
    except BaseException as error:
        if not is_failure(error):
            raise
        return f"its tokenizer cannot encode plain text ({error}); copy or download it again"
    if len(set(ids)) < 2:  # the one for what is unknown
        return f"its tokenizer knows nothing of {_TEXT!r}; copy or download it again"
    return None


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


LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_CONFIG_SIZES = (
    *LAYERS, "vocab_size", "hidden_size", "n_embd", "num_attention_heads", "num_key_value_heads", "n_head", "head_dim",
)  # fmt: skip
_SMALL = (
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps", "norm_epsilon",
)  # fmt: skip
_ROPE = ("rope_parameters", "rope_scaling")  # where newer and older files say how positions are told
_BASES = ("rope_theta", "rope_local_base_freq")
_CONFIG_TEXT = "text_config"


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says of the part that reads and writes text, which has a section where there are others."""
    text = config.get(_CONFIG_TEXT)
    return {**config, **({k: v for k, v in text.items() if v is not None} if isinstance(text, dict) else {})}


def config_faults(config: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """What no model can be built or computed with, by key; a key that is null is as one that is not there.

    Args:
        config: what config.json holds, or a part of it.
        where: the keys that lead to the part, each with a dot.
    """
    for key in _CONFIG_SIZES:
        if (value := _one(config.get(key))) is not None and not (is_finite_number(value, integer=True) and value > 0):
            yield _fault(where + key, value, "a whole number above 0")
    for key in _SMALL:
        if (value := config.get(key)) is not None and not (is_finite_number(value) and value >= 0):
            yield _fault(where + key, value, "a number of 0 or above")
    yield from _base_faults(config, where)
    if not where and isinstance(text := config.get(_CONFIG_TEXT), dict):
        yield from config_faults(text, f"{where}{_CONFIG_TEXT}.")


def _base_faults(config: Mapping[str, Any], where: str) -> Iterator[str]:
    """Those of rotary positions: in the config itself, in a part of its own, or in one for each kind of layer."""
    inside = where.removeprefix(f"{_CONFIG_TEXT}.").split(".")[:-1]
    for key in (*_BASES, "factor") if inside else _BASES:
        if (value := _one(config.get(key))) is not None and not (is_finite_number(value) and value > 0):
            yield _fault(where + key, value, "a number above 0")
    for key, part in config.items():
        if isinstance(part, dict) and len(inside) < 2 and (inside or [key])[0] in _ROPE:
            yield from _base_faults(part, f"{where}{key}.")


def _one(value: Any) -> Any:
    """`value`, but for a list, in which some architectures give each layer its own."""
    return None if isinstance(value, list) else value


def _fault(key: str, value: Any, wanted: str) -> str:
    text = repr(value)
    shown = text if len(text) <= 60 else f"{text[:57]}…"
    return f"config.json: {key} is {shown}; should be {wanted}; correct it, or copy or download it again"
