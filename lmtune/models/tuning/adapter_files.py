"""Can this folder be used as an adapter? Its files before PEFT reads them, and `lmtune.json`, which PEFT does not know.

    config = check_adapter(folder)        # adapter_config.json, or a ModelError with every problem
    metadata = Metadata.read(folder)      # how to talk to the model as in training

Only plain LoRA passes: `SETTINGS` lists the keys of PEFT's config that lmtune uses, and what each may hold. A key that
is not listed must be unset, because such keys name classes to import, replicate layers, or change the base.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Required, TypedDict, cast, get_args

from lmtune.config.schema import MAX_RANK, Quantization
from lmtune.data.rendering import Template
from lmtune.errors import ModelError
from lmtune.io.sandbox import match_too_slowly
from lmtune.io.text import format_list, is_finite_number, shorten
from lmtune.models.validate import read_object, weights_problem

WEIGHTS, CONFIG, METADATA = "adapter_model.safetensors", "adapter_config.json", "lmtune.json"
Into = Literal["trained", "original"]  # the base weights that a merge adds to: dequantized, or as published
Check = Callable[[Any], bool]


class LoraSettings(TypedDict, total=False):
    """The keys of `adapter_config.json` that lmtune reads; PEFT reads more of them (`SETTINGS`)."""

    r: Required[int]
    lora_alpha: Required[float]
    target_modules: Required[str | list[str]]
    target_parameters: list[str] | None
    use_rslora: bool
    use_dora: bool
    base_model_name_or_path: str | None


def check_adapter(folder: Path) -> LoraSettings:
    """The content of `adapter_config.json`, after every file was checked.

    Raises:
        ModelError: with every problem, without the folder's name.
    """
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            is_pickled = any((folder / f"adapter_model{ending}").is_file() for ending in (".bin", ".pt", ".pth"))
            fix = "a pickled adapter can run code; ask the author for safetensors" if is_pickled else "not an adapter"
            raise ModelError(f"no {name}; {fix}")
    config = read_object(folder / CONFIG)
    problems = [f"{CONFIG}: {problem}" for problem in config_problems(config)]
    for name in (METADATA, "tokenizer_config.json", "generation_config.json"):
        try:
            tree = read_object(folder / name) if (folder / name).is_file() else {}
        except ModelError as error:
            problems.append(str(error))
            continue
        if name == METADATA:
            problems += [f"{name}: {problem}" for problem in _metadata_problems(tree)]
        elif "auto_map" in tree:
            problems.append(f"{name}: auto_map names code of the repository, which lmtune never runs")
    if problem := weights_problem(folder / WEIGHTS):
        problems.append(problem)
    else:
        problems += [f"{WEIGHTS}: {problem}" for problem in _tensor_problems(folder / WEIGHTS)]
    if problems:
        raise ModelError(f"lmtune cannot use this adapter\n{format_list(problems)}")
    return cast(LoraSettings, config)


def _tensor_problems(path: Path) -> Iterator[str]:
    """What the header shows; whether shapes fit is known once the adapter is on its base."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        types = {name: str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118 - not a dict
    if not any("lora_A" in name for name in types):
        yield "no LoRA tensor"
    yield from (f"{n}: type {t}; expected a float" for n, t in types.items() if t not in ("F32", "F16", "BF16"))


# --- lmtune.json


@dataclass(frozen=True)
class Metadata:
    """What `lmtune.json` of an adapter or merged folder holds: how to talk to the model as in training.

    The defaults are those of an adapter that another tool made.

    Attributes:
        base_model: Hub id, or the path from the folder of this file to the base's.
        revision: of the base.
        quantization, dtype: in which the base was held.
        base_fingerprint: of the base's stored weights; None if it is not known.
        template, system: how messages became tokens.
        stop_token_ids, stop_tokens: what ends an answer, the trained one first.
        rendered_at: the time that the template wrote into the prompts; None if it writes none.
        merged: of a merged folder: which base weights the adapter was added to.
    """

    base_model: str | None = None
    revision: str | None = None
    quantization: Quantization = "none"
    dtype: str = "auto"
    base_fingerprint: str | None = None
    template: Template = "auto"
    system: str | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop_tokens: tuple[str, ...] = ()
    rendered_at: str | None = None
    merged: Into | None = None

    @classmethod
    def read(cls, folder: Path) -> Metadata:
        """That of a folder; the defaults where another tool made it.

        Raises:
            ModelError: the file is damaged, or holds what this lmtune does not know.
        """
        if not (folder / METADATA).is_file():
            return cls()
        try:
            tree = read_object(folder / METADATA)
        except ModelError as error:
            raise ModelError(f"{folder}: {error}") from None
        if problems := list(_metadata_problems(tree)):
            raise ModelError(f"{folder}: {METADATA}: {'; '.join(problems)}")
        known: dict[str, Any] = {f.name: tree[f.name] for f in fields(cls) if tree.get(f.name) is not None}
        return cls(**known | {key: tuple(known[key]) for key in _LISTS if key in known})

    def as_dict(self) -> dict[str, object]:
        """For `lmtune.json`; `rendered_at` and `merged` only where they are set."""
        return {k: v for k, v in asdict(self).items() if v is not None or k not in ("rendered_at", "merged")}


_CHOICES: dict[str, tuple[str, ...]] = {
    "quantization": get_args(Quantization),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "template": get_args(Template),
    "merged": get_args(Into),
}
_LISTS = {"stop_token_ids": (int, "token ids"), "stop_tokens": (str, "tokens")}


def _metadata_problems(tree: Mapping[str, Any]) -> Iterator[str]:
    for field in fields(Metadata):
        key, value = field.name, tree.get(field.name)
        if value is None:
            continue
        if key in _LISTS:
            kind, expected = _LISTS[key]
            is_right = isinstance(value, list) and all(type(item) is kind for item in value)
            expected = f"a list of {expected}"
        else:
            is_right = value in _CHOICES[key] if key in _CHOICES else isinstance(value, str)
            expected = ", ".join(_CHOICES[key]) if key in _CHOICES else "text"
        if not is_right:
            yield f"{key}: {shorten(value)}; expected {expected}"


# --- adapter_config.json


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_RANK  # PEFT allocates by it before a tensor is compared


def _is_scale(value: Any) -> bool:
    return is_finite_number(value) and 0 < value <= 1e30  # so that alpha / rank is finite in fp32


def _is_names(value: Any) -> bool:
    names = [value] if isinstance(value, str) and value else value
    return isinstance(names, list) and all(isinstance(name, str) and name for name in names)


def _is_layers(value: Any) -> bool:
    layers = value if isinstance(value, list) else [value]
    return all(type(layer) is int and layer >= 0 for layer in layers)


def _is_mapping(is_right: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(is_right, value.values()))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_NAMES = (_is_names, "a name or a list of names")
_BOOLEAN = (lambda value: isinstance(value, bool), "true or false")
# What each key may hold if it is set, and in words
SETTINGS: dict[str, tuple[Check, str]] = {
    "r": (_is_rank, f"1 to {MAX_RANK:,}"),
    "lora_alpha": (_is_scale, "a number above 0"),
    "lora_dropout": (lambda value: is_finite_number(value) and 0 <= value < 1, "0 to below 1"),
    **dict.fromkeys(("target_modules", "exclude_modules", "modules_to_save", "target_parameters"), _NAMES),
    "layers_to_transform": (_is_layers, "a layer's number or a list of numbers"),
    "layers_pattern": (lambda value: value == "" or _is_names(value), _NAMES[1]),
    "rank_pattern": (_is_mapping(_is_rank), f"names with ranks of 1 to {MAX_RANK:,}"),
    "alpha_pattern": (_is_mapping(_is_scale), "names with numbers above 0"),
    "bias": (lambda value: value == "none", "none: other biases belong to the base"),
    "base_model_name_or_path": (_is_text, "text"),
    "revision": (_is_text, "text"),
    "task_type": (lambda value: value == "CAUSAL_LM", "CAUSAL_LM"),
    **dict.fromkeys(
        ("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias", "inference_mode", "ensure_weight_tying"), _BOOLEAN
    ),
}
_REQUIRED = ("r", "lora_alpha", "target_modules")
_IGNORED = ("peft_version", "megatron_core", "qalora_group_size", "eva_config", "merge_weights")
# Ways to initialize that leave the base's weights as they are. PiSSA, for example, changes the base.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


def config_problems(config: Mapping[str, object]) -> Iterator[str]:
    """What keeps PEFT's `config` from being that of a plain LoRA adapter."""
    if config.get("peft_type") != "LORA":
        yield f"peft_type: {shorten(config.get('peft_type'))}; expected LORA"
        return
    right = dict(config)
    for key, (is_right, expected) in SETTINGS.items():
        value = config.get(key)
        if (key in _REQUIRED) if value is None else not is_right(value):
            yield f"{key}: {shorten(value)}; expected {expected}"
            right[key] = None
    if config.get("target_modules") == [] and not config.get("target_parameters"):
        yield f"target_modules: []; expected {_NAMES[1]}"
    yield from pattern_problems(right)
    start = config.get("init_lora_weights")
    if not isinstance(start, (bool, str, type(None))) or start not in _INITIALISATIONS:
        yield f"init_lora_weights: {shorten(start)}; it may change the base's weights; save it as a plain LoRA adapter"
    known = {*SETTINGS, *_IGNORED, "peft_type", "init_lora_weights"}
    for key, value in config.items():
        if key not in known and value:
            yield f"{key[:60]}: not a setting of a plain LoRA adapter; remove it"


# --- its regular expressions


def _patterns(config: Mapping[str, object]) -> Iterator[tuple[str, str, str]]:
    """(key, text, expression as PEFT matches it against the name of every module)."""
    for key in ("target_modules", "exclude_modules"):
        if isinstance(text := config.get(key), str):
            yield key, text, text
    for key in ("rank_pattern", "alpha_pattern"):
        if isinstance(names := config.get(key), dict):
            yield from ((key, name, rf"(.*\.)?({name})$") for name in names)
    layers = config.get("layers_pattern")
    names = [layers] if isinstance(layers, str) else layers if isinstance(layers, list) else []
    yield from (("layers_pattern", name, rf".*\.{name}\.(\d+)\.") for name in names)


def is_too_slow_to_match(config: Mapping[str, object], names: Sequence[str]) -> bool:
    """Whether the expressions in an adapter's config take too long over these names of modules."""
    return match_too_slowly([pattern for *_, pattern in _patterns(config)], names)


def pattern_problems(config: Mapping[str, object]) -> Iterator[str]:
    """What in an adapter's config is not a regular expression, or is one that Python cannot compile."""
    for key, text, pattern in _patterns(config):
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            yield f"{key}: {shorten(text)} is not a regular expression: {error}"
