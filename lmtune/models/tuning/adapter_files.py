"""Can this folder be used as an adapter? Its files before PEFT reads them, and `lmtune.json`, which PEFT does not know.

    settings = check_adapter(folder)      # of adapter_config.json, or a ModelError with every problem
    metadata = Metadata.read(folder)      # how to talk to the model as in training

Only plain LoRA passes. A key of PEFT's config that `LoraSettings` does not list must be unset: such keys name classes
to import, replicate layers, or change the base.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, cast, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from lmtune.config.load import build_config
from lmtune.config.schema import MAX_RANK, Dtype, Quantization
from lmtune.data.rendering import Template
from lmtune.errors import ConfigError, ModelError
from lmtune.io.sandbox import match_too_slowly
from lmtune.io.text import format_list, shorten
from lmtune.models.head import Head
from lmtune.models.validate import read_object, weights_problem

WEIGHTS, CONFIG, METADATA = "adapter_model.safetensors", "adapter_config.json", "lmtune.json"
Into = Literal["trained", "original"]  # the base weights that a merge adds to: dequantized, or as published
Names = str | list[str]
Rank = Annotated[int, Field(strict=True, gt=0, le=MAX_RANK)]  # PEFT allocates by it before a tensor is compared
Scale = Annotated[int | float, Field(gt=0, le=1e30)]  # so that alpha / rank is finite in fp32


Index = Annotated[int, Field(strict=True, ge=0, lt=2**24)]  # of a row of the embeddings, which are made so long


class _Required(TypedDict):
    r: Rank
    lora_alpha: Scale
    target_modules: Names


class LoraSettings(_Required, total=False):
    """The keys of `adapter_config.json` that a plain LoRA adapter may set."""

    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    exclude_modules: Names
    modules_to_save: Names
    target_parameters: Names
    layers_to_transform: int | list[int]
    layers_pattern: Names
    rank_pattern: dict[str, Rank]
    alpha_pattern: dict[str, Scale]
    bias: Literal["none"]  # other biases belong to the base
    base_model_name_or_path: str
    revision: str
    task_type: Literal["CAUSAL_LM", "SEQ_CLS"]
    use_dora: bool
    use_rslora: bool
    fan_in_fan_out: bool
    lora_bias: bool
    inference_mode: bool
    ensure_weight_tying: bool
    trainable_token_indices: list[Index] | dict[str, list[Index]]


_SETTINGS = {key: TypeAdapter(kind) for key, kind in get_type_hints(LoraSettings, include_extras=True).items()}
_IGNORED = ("peft_type", "peft_version", "megatron_core", "qalora_group_size", "eva_config", "merge_weights")
# Ways to initialize that leave the base's weights as they are. PiSSA, for example, changes the base.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


def check_adapter(folder: Path) -> LoraSettings:
    """The settings of an adapter, after every file was checked.

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
    try:
        Metadata.read(folder)
        for name in ("tokenizer_config.json", "generation_config.json"):
            if (folder / name).is_file() and "auto_map" in read_object(folder / name):
                problems.append(f"{name}: auto_map names code of the repository, which lmtune never runs")
    except ModelError as error:
        problems.append(str(error))
    problems += _tensor_problems(folder / WEIGHTS)
    if problems:
        raise ModelError(f"lmtune cannot use this adapter\n{format_list(problems)}")
    return cast(LoraSettings, {key: config[key] for key in _SETTINGS if config.get(key) is not None})


def _tensor_problems(path: Path) -> Iterator[str]:
    """What the header shows; whether shapes fit is known once the adapter is on its base."""
    from safetensors import safe_open

    if problem := weights_problem(path):
        yield problem
        return
    with safe_open(path, framework="numpy") as file:
        types = {name: str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118 - not a dict
    if not any("lora_A" in name for name in types):
        yield f"{path.name}: no LoRA tensor"
    floats = ("F32", "F16", "BF16")
    yield from (f"{path.name}: {n}: type {t}; expected a float" for n, t in types.items() if t not in floats)


@dataclass(frozen=True)
class Metadata:
    """What `lmtune.json` of an adapter or merged folder holds: how to talk to the model as in training.

    The defaults are those of an adapter that another tool made.

    Attributes:
        base_model: Hub id, or the path from the folder of this file to the base's.
        revision: of the base.
        quantization, dtype: in which the base was held.
        base_fingerprint: of the base's stored weights.
        template, system: how messages became tokens.
        stop_token_ids, stop_tokens: what ends an answer, the trained one first.
        rendered_at: the time that the template wrote into the prompts; None if it writes none.
        merged: of a merged folder: which base weights the adapter was added to.
        head: of a classifier.
    """

    base_model: str | None = None
    revision: str | None = None
    quantization: Quantization = "none"
    dtype: Dtype = "auto"
    base_fingerprint: str | None = None
    template: Template = "auto"
    system: str | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop_tokens: tuple[str, ...] = ()
    rendered_at: str | None = None
    merged: Into | None = None
    head: Head | None = None

    @classmethod
    def read(cls, folder: Path) -> Metadata:
        """That of a folder; the defaults where another tool made it.

        Raises:
            ModelError: the file is damaged, or holds what this lmtune does not know.
        """
        try:
            tree = read_object(folder / METADATA) if (folder / METADATA).is_file() else {}
            known = {field.name: tree[field.name] for field in fields(cls) if tree.get(field.name) is not None}
            return build_config(cls, known, METADATA)
        except (ConfigError, ModelError) as error:
            raise ModelError(f"{folder}: {error}") from None

    def as_dict(self) -> dict[str, object]:
        """For `lmtune.json`; the last three only where they are set."""
        return {k: v for k, v in asdict(self).items() if v is not None or k not in ("rendered_at", "merged", "head")}


def trained_rows(config: LoraSettings) -> list[int]:
    """The rows of the embeddings that an adapter has trained: those of new tokens."""
    rows = config.get("trainable_token_indices") or []
    return [row for some in rows.values() for row in some] if isinstance(rows, dict) else list(rows)


def config_problems(config: Mapping[str, object]) -> Iterator[str]:
    """What keeps PEFT's `config` from being that of a plain LoRA adapter."""
    if config.get("peft_type") != "LORA":
        yield f"peft_type: {shorten(config.get('peft_type'))}; expected LORA"
        return
    right = {key: value for key, value in config.items() if value is not None}
    yield from (f"{key}: missing" for key in sorted(LoraSettings.__required_keys__ - right.keys()))
    for key in [key for key in _SETTINGS if key in right]:
        try:
            _SETTINGS[key].validate_python(right[key])
        except ValidationError as error:
            expected = error.errors()[0]["msg"].removeprefix("Input should be ")
            yield f"{key}: {shorten(right.pop(key))}; expected {expected}"
    yield from pattern_problems(right)
    start = config.get("init_lora_weights")
    if not isinstance(start, (bool, str, type(None))) or start not in _INITIALISATIONS:
        yield f"init_lora_weights: {shorten(start)}; it may change the base's weights; save it as a plain LoRA adapter"
    known = {*_SETTINGS, *_IGNORED, "init_lora_weights"}
    for key, value in config.items():
        if key not in known and value:
            yield f"{key[:60]}: not a setting of a plain LoRA adapter; remove it"


# --- regular expressions in an adapter's config


def _patterns(config: Mapping[str, object]) -> Iterator[tuple[str, str, str]]:
    """(key, text, expression as PEFT matches it against the name of every module)."""
    for key in ("target_modules", "exclude_modules"):
        if isinstance(text := config.get(key), str):
            yield key, text, text
    for key in ("rank_pattern", "alpha_pattern"):
        if isinstance(names := config.get(key), dict):
            yield from ((key, name, rf"(.*\.)?({name})$") for name in names)
    layers: Any = config.get("layers_pattern") or []
    names = [layers] if isinstance(layers, str) else layers
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
