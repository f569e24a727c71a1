"""What a base's config.json says by itself: sizes of which a model can be built, and numbers with which it computes.

transformers builds a model without layers, and one that divides by zero at its first token, without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lmtune.io.text import is_finite_number

LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_SIZES = (
    *LAYERS, "vocab_size", "hidden_size", "n_embd", "num_attention_heads", "num_key_value_heads", "n_head", "head_dim",
)  # fmt: skip
_SMALL = (
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps", "norm_epsilon",
)  # fmt: skip
_ROPE = ("rope_parameters", "rope_scaling")  # where newer and older files say how positions are told
_BASES = ("rope_theta", "rope_local_base_freq")
_TEXT = "text_config"


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says of the part that reads and writes text, which has a section where there are others."""
    text = config.get(_TEXT)
    return {**config, **({k: v for k, v in text.items() if v is not None} if isinstance(text, dict) else {})}


def config_faults(config: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """What no model can be built or computed with, by key; a key that is null is as one that is not there.

    Args:
        config: what config.json holds, or a part of it.
        where: the keys that lead to the part, each with a dot.
    """
    for key in _SIZES:
        if (value := _one(config.get(key))) is not None and not (is_finite_number(value, whole=True) and value > 0):
            yield _fault(where + key, value, "a whole number above 0")
    for key in _SMALL:
        if (value := config.get(key)) is not None and not (is_finite_number(value) and value >= 0):
            yield _fault(where + key, value, "a number of 0 or above")
    yield from _base_faults(config, where)
    if not where and isinstance(text := config.get(_TEXT), dict):
        yield from config_faults(text, f"{where}{_TEXT}.")


def _base_faults(config: Mapping[str, Any], where: str) -> Iterator[str]:
    """Those of rotary positions: in the config itself, in a part of its own, or in one for each kind of layer."""
    inside = where.removeprefix(f"{_TEXT}.").split(".")[:-1]
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
