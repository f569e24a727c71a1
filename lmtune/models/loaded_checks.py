"""A base model as transformers has loaded it, held against what was asked for.

transformers goes on where weights are missing (with random numbers), where some are left over, where the files are in
another quantization, and where an adapter lies beside them.
"""

from __future__ import annotations

from typing import Any

from lmtune.config import ModelConfig
from lmtune.console import warn
from lmtune.errors import ModelError, listed
from lmtune.models.base_checks import adapter_beside


def check_loaded(model: ModelConfig, loaded: Any, report: dict[str, Any]) -> None:
    """Make sure that the model is the one in the files; warn of what is odd about it.

    Args:
        model: what was asked for.
        loaded: what transformers made of it.
        report: its loading info.

    Raises:
        ModelError: weights are missing or of other shapes, or an adapter came with them.
    """
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise adapter_beside(model.name)
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random numbers
        raise ModelError(
            f"model.name: {model.name} lacks weights that its config.json asks for; copy or download it again, or use "
            f"a causal language model\n{listed(missing, 8)}"
        )
    if others := sorted(report["mismatched_keys"]):
        lines = [f"{name}: {list(stored)}, not {list(wanted)}" for name, stored, wanted in others]
        raise ModelError(
            f"model.name: {model.name}: the weights have other shapes than its config.json says; copy or download both "
            f"again\n{listed(lines, 8)}"
        )
    if left := sorted(report["unexpected_keys"]):
        warn(
            f"model.name: {model.name} holds {len(left)} weights that its config.json has no place for, such as "
            f"{left[0]}; is it the config of another model?"
        )
    asked, stored = model.quantization.replace("fp8", "none"), _held_in(loaded)
    if stored != asked:
        warn(f"model.quantization: {asked} is overruled: {model.name} is stored in {stored}, and is used like that")


def _held_in(loaded: Any) -> str:
    """The quantization of a loaded model, whoever asked for it."""
    if (quantizer := getattr(loaded, "hf_quantizer", None)) is None:
        return "none"
    settings = quantizer.quantization_config.to_dict()
    if settings.get("load_in_8bit"):
        return "int8"
    return str(settings["bnb_4bit_quant_type"] if settings.get("load_in_4bit") else settings.get("quant_method"))
