"""The files of an adapter folder, checked before anything reads them: PEFT's config, the tensors, `lmtune.json`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from lmtune.config.schema import Quantization
from lmtune.data.rendering import Template
from lmtune.errors import ModelError
from lmtune.io.text import format_list
from lmtune.models.pattern_limits import pattern_faults
from lmtune.models.validate import generation_fault, odd_files, read_object, weights_fault

__all__ = ["CONFIG", "NOTES", "WEIGHTS", "check_adapter", "read_object"]
WEIGHTS, CONFIG, NOTES = "adapter_model.safetensors", "adapter_config.json", "lmtune.json"
_GENERATION = "generation_config.json"
_FINGERPRINT = re.compile("[0-9a-f]{32}")
_NOTES_ALLOWED = {
    "quantization": get_args(Quantization),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "template": get_args(Template),
}


def check_adapter(folder: Path) -> dict[str, Any]:
    """The content of `adapter_config.json`, after everything in the folder was checked.

    Raises:
        ModelError: with everything that is wrong with it, without the folder's name.
    """
    if odd := odd_files(folder):
        raise ModelError("; ".join(odd))
    if not (folder / WEIGHTS).is_file():
        pickled = any((folder / f"adapter_model{suffix}").is_file() for suffix in (".bin", ".pt", ".pth"))
        hint = "it holds a pickled adapter, which can run code when read" if pickled else "it is no adapter folder"
        raise ModelError(f"no {WEIGHTS}; {hint}")
    if not (folder / CONFIG).is_file():
        raise ModelError(f"no {CONFIG}; it is no adapter folder")
    config = read_object(folder / CONFIG)
    problems = [f"{CONFIG}: {fault}" for fault in config_faults(config)]
    if (folder / NOTES).is_file():
        problems += [f"{NOTES}: {fault}" for fault in _notes_faults(read_object(folder / NOTES))]
    problems += _text_faults(folder)
    if unreadable := weights_fault(folder / WEIGHTS):
        problems.append(unreadable)
    else:
        problems += [f"{WEIGHTS}: {fault}" for fault in _weight_faults(folder / WEIGHTS, config)]
    if problems:
        raise ModelError(f"this is no adapter that lmtune can use\n{format_list(problems)}")
    return config


def check_texts(folder: Path) -> None:
    """Look at what transformers reads beside an adapter's weights, before it does.

    Raises:
        ModelError: with everything that is wrong with it.
    """
    if faults := odd_files(folder) or list(_text_faults(folder)):
        raise ModelError(f"{folder}: {'; '.join(faults)}")


def _text_faults(folder: Path) -> Iterator[str]:
    for name in ("tokenizer_config.json", _GENERATION):
        path = folder / name
        if not path.is_file():
            continue
        try:
            tree = read_object(path)
        except ModelError as error:
            yield str(error)
            continue
        if "auto_map" in tree:
            yield f"{name}: auto_map names code of the repository, which lmtune never runs"
        elif name == _GENERATION and (fault := generation_fault(path)):
            yield fault


def _notes_faults(notes: Mapping[str, Any]) -> Iterator[str]:
    for key, allowed in _NOTES_ALLOWED.items():
        if key in notes and notes[key] not in allowed:
            yield f"{key} is {notes[key]!r}; should be {' or '.join(allowed)}"
    for key in ("base_model", "revision", "base_fingerprint", "system"):
        if not isinstance(notes.get(key), (str, type(None))):
            yield f"{key} should be text"
    trained_on = notes.get("base_fingerprint")
    if isinstance(trained_on, str) and not _FINGERPRINT.fullmatch(trained_on):
        yield f"base_fingerprint is {trained_on[:60]!r}; should be 32 hex digits, or null"


def _weight_faults(path: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the tensors, as far as their header tells: names, shapes, types; no weight is read."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        shapes = {name: list(part.get_shape()) for name, part in slices.items()}
        types = {name: str(part.get_dtype()) for name, part in slices.items()}
    if not any("lora_A" in name for name in shapes):
        yield "holds no LoRA tensor"
    yield from (f"{n}: type {t}; should be a float" for n, t in types.items() if t not in ("F32", "F16", "BF16"))
    for name, shape in shapes.items():
        pair = shapes.get(name.replace("lora_A", "lora_B"))
        if "lora_A" not in name:
            continue
        if pair is None or len(shape) < 2 or len(pair) < 2 or shape[0] != pair[1]:
            yield f"{name}: no lora_B that fits its shape {shape}"
        elif not config.get("rank_pattern") and not _is_of_rank(shape[0], config):
            yield f"{name}: rank {shape[0]}, but {CONFIG} says {config.get('r')}"


def _is_of_rank(rows: int, config: Mapping[str, Any]) -> bool:
    """Whether an A of `rows` is of the config's rank; one over a tensor of experts has the rows of all of them."""
    rank = config.get("r")
    if not isinstance(rank, int) or rank < 1:  # which is said already
        return rows == rank
    return rows == rank or (bool(config.get("target_parameters")) and rows % rank == 0)


_MAX_RANK, _MAX_ALPHA, _MAX_NAMES, _MAX_LAYERS = 4096, 1e30, 2000, 10_000
# How the adapter began: ways that leave the base's weights as they are. Under the others, PiSSA for one, an adapter
# belongs to a base that was changed with it.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
_IGNORED = ("peft_version", "megatron_core", "qalora_group_size", "eva_config", "merge_weights")


def _is_rank(value: Any) -> bool:
    return _is_whole(value) and 1 <= value <= _MAX_RANK


def _is_alpha(value: Any) -> bool:
    return _is_number(value) and 0 < value <= _MAX_ALPHA


def _is_names(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not 0 < len(names) <= _MAX_NAMES:
        return False
    return all(isinstance(name, str) and 0 < len(name) <= 500 for name in names)


def _is_layers(value: Any) -> bool:
    layers = [value] if _is_whole(value) else value
    if not isinstance(layers, list) or len(layers) > _MAX_LAYERS:
        return False
    return all(_is_whole(layer) and 0 <= layer < _MAX_LAYERS for layer in layers)


def _is_pattern(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict) and len(value) <= _MAX_NAMES and all(map(is_right, value.values()))
        and all(len(name) <= 500 for name in value)
    )  # fmt: skip


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 4096


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool)


_TRUTHS = ("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias", "inference_mode", "ensure_weight_tying")
_NAMES = f"a name or a list of up to {_MAX_NAMES:,} names"
_RANK, _ALPHA = f"1 to {_MAX_RANK}", f"a number above 0, at most {_MAX_ALPHA:g}"
# What each key may be if it is there and not null, and how that is said
USED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, _RANK),
    "lora_alpha": (_is_alpha, _ALPHA),
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value < 1, "0 to below 1"),
    "target_modules": (lambda value: value == [] or _is_names(value), _NAMES),
    "exclude_modules": (_is_names, _NAMES),
    "modules_to_save": (lambda value: value == [] or _is_names(value), _NAMES),
    "target_parameters": (lambda value: value == [] or _is_names(value), _NAMES),
    "layers_to_transform": (_is_layers, "the number of a layer, or a list of such"),
    "layers_pattern": (lambda value: value in ("", []) or _is_names(value), _NAMES),
    "rank_pattern": (_is_pattern(_is_rank), f"names with {_RANK}"),
    "alpha_pattern": (_is_pattern(_is_alpha), f"names with {_ALPHA}"),
    "bias": (lambda value: value == "none", "none: other biases belong to the base"),
    "base_model_name_or_path": (_is_text, "text"),
    "revision": (_is_text, "text"),
    "task_type": (lambda value: value == "CAUSAL_LM", "CAUSAL_LM"),
    **dict.fromkeys(_TRUTHS, (_is_truth, "true or false")),
}
_NEEDED = ("r", "lora_alpha", "target_modules")


def config_faults(config: Mapping[str, Any]) -> Iterator[str]:
    """What keeps `config` from being a plain LoRA config."""
    kind = config.get("peft_type")
    if kind != "LORA":
        yield f"peft_type is {_short(kind)}; lmtune uses LORA adapters"
        return
    right = dict(config)
    for key, (is_right, wanted) in USED.items():
        value = config.get(key)
        if (key in _NEEDED) if value is None else not is_right(value):
            yield f"{key} is {_short(value)}; should be {wanted}"
            right[key] = None
    if config.get("target_modules") == [] and not config.get("target_parameters"):
        yield f"target_modules is []; should be {_NAMES}, or target_parameters be some"
    yield from (f"{fault}; correct it" for fault in pattern_faults(right))
    beginning = config.get("init_lora_weights")
    if not isinstance(beginning, (bool, str, type(None))) or beginning not in _BEGINNINGS:
        yield (
            f"init_lora_weights is {_short(beginning)}, under which the base's weights may be others; "
            "save it as a plain LoRA adapter"
        )
    known = {*USED, *_IGNORED, "peft_type", "init_lora_weights"}
    yield from (
        f"{_short(key)[1:-1]} is set, which a plain LoRA adapter does not need; remove it"
        for key, value in config.items()
        if key not in known and value
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
