"""A base model as transformers has loaded it, held against what was asked for.

transformers goes on where weights are missing (with random numbers), where some are left over, where the files are in
another quantization, and where an adapter lies beside them.
"""

from __future__ import annotations

from typing import Any

import torch

from lmtune.config.schema import ModelConfig
from lmtune.errors import ModelError, listed
from lmtune.io.console import warn
from lmtune.models.validate import adapter_beside

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
            f"a causal language model\n{listed(missing, 8)}"
        )
    if others := sorted(report["mismatched_keys"]):
        lines = [f"{name}: {list(stored)}, not {list(wanted)}" for name, stored, wanted in others]
        raise ModelError(
            f"model.name: {model.name}: the weights have other shapes than its config.json says; copy or download both "
            f"again\n{listed(lines, 8)}"
        )
    if broken := [name for name, weight in loaded.named_parameters() if not _is_finite(weight)]:
        other = ", or set model.dtype, in which larger numbers fit" if model.dtype == "float16" else ""
        raise ModelError(
            f"model.name: {model.name}: weights hold NaN or infinity; copy or download it again{other}\n"
            f"{listed(broken, 8)}"
        )
    if left := sorted(report["unexpected_keys"]):
        warn(
            f"model.name: {model.name} holds {len(left)} weights that its config.json has no place for, such as "
            f"{left[0]}; is it the config of another model?"
        )
    asked, stored = model.quantization.replace("fp8", "none"), _held_in(loaded)
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
