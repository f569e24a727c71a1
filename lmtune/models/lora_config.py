"""`adapter_config.json` against a schema of our own: the keys that plain LoRA has, each with its bounds.

PEFT's config has over 40 keys, most of them for variants that multiply layers, import classes, change the base's
weights or act at certain tokens only. What lmtune hands to PEFT are the keys in `USED`, and any other must be empty,
as PEFT writes it where the variant is not used. So a key that only a later PEFT knows does no harm unless it is set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lmtune.models.pattern_limits import pattern_faults

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
