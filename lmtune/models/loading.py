"""Loading a base model and its tokenizer: Hub id, local folder or `tiny`; unquantised, nf4 or int8; GPU or CPU alike.

    model = load_model(ModelConfig(name="tiny", quantization="nf4"))

Only safetensors are read and code from a model repository is never run. What a user can mend (a misspelt name, no
network, pickled weights) becomes a `ModelError` that says how.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from lmtune.config import ModelConfig
from lmtune.errors import ModelError, listed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_name(name: str) -> str:
    """What transformers should load for `model.name`: the packaged folder for `tiny`, else the name itself."""
    if name == "tiny":
        from lmtune.demo import tiny_path

        return str(tiny_path())
    return name


def default_device() -> torch.device:
    """This process's GPU if there is one and Accelerate was not told to use the CPU, else the CPU."""
    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in ("1", "true", "yes"):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def compute_dtype(device: torch.device, setting: str = "auto") -> torch.dtype:
    """The dtype of the frozen weights and the forward pass.

    `auto` is bf16 on GPUs that have it and fp32 elsewhere: without AVX512-BF16 a bf16 matmul on a CPU is several times
    slower than fp32.
    """
    if setting != "auto":
        return DTYPES[setting]
    real_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if real_bf16 else torch.float32


def load_tokenizer(model: ModelConfig) -> Any:
    """The tokenizer of `model`.

    Raises:
        ModelError: it cannot be found or read.
    """
    from transformers import AutoTokenizer

    quiet_libraries()
    path = _checked_path(model.name)
    try:
        return AutoTokenizer.from_pretrained(path, revision=model.revision, trust_remote_code=False)
    except Exception as error:
        raise _model_error(model, "tokenizer", error) from error


def load_model(model: ModelConfig, device: torch.device | str | None = None) -> Any:
    """The base model with frozen weights, in evaluation mode, on `device`.

    Args:
        model: name, revision, quantization and dtype.
        device: where to; by default `default_device()`.

    Raises:
        ModelError: the model cannot be found, read, or held in the quantization asked for.
    """
    from transformers import AutoModelForCausalLM

    quiet_libraries()
    device = torch.device(device) if device is not None else default_device()
    path = _checked_path(model.name)
    dtype = compute_dtype(device, model.dtype)
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            path, revision=model.revision, dtype=dtype, quantization_config=_quantization(model, dtype),
            device_map={"": device}, trust_remote_code=False, use_safetensors=True, output_loading_info=True,
        )  # fmt: skip
    except Exception as error:
        raise _model_error(model, "weights", error) from error
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random numbers
        raise ModelError(
            f"model.name: {model.name} lacks weights that its config.json asks for; copy or download it again, or use "
            f"a causal language model\n{listed(missing, 8)}"
        )
    loaded.requires_grad_(False)
    _keep_one_layout(loaded)
    return loaded.eval()


def weight_files(model: ModelConfig) -> list[Path]:
    """The safetensors files that `load_model` has read, in order; for a Hub id those in the local cache.

    Raises:
        ModelError: there are none.
    """
    import json

    from transformers.utils import cached_file

    path = resolve_name(model.name)

    def find(name: str) -> str | None:
        try:
            found = cached_file(
                path, name, revision=model.revision, _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False, local_files_only=not Path(path).is_dir(),
            )  # fmt: skip
        except OSError as error:
            raise _model_error(model, "weights", error) from error
        return str(found) if found else None

    if single := find("model.safetensors"):
        return [Path(single)]
    if index := find("model.safetensors.index.json"):
        shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
        return [Path(index).with_name(shard) for shard in shards]
    raise ModelError(f"model.name: {model.name} has no model.safetensors; lmtune reads safetensors only")


def stored_dtype(model: ModelConfig) -> torch.dtype:
    """The dtype in which the base's weights are stored on disk: that of its first matrix."""
    from safetensors import safe_open

    with safe_open(weight_files(model)[0], framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            tensor = file.get_slice(name)
            if len(tensor.get_shape()) == 2:
                kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
                return kind.get(tensor.get_dtype(), torch.float32)
    return torch.float32


def quiet_libraries() -> None:
    """Switch off the libraries' own progress bars and notes; lmtune says what matters itself."""
    import transformers.utils.logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\.")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # "inputs will be cast" and "failed to load the optional kernels" on every int8 or nf4 layer
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for each of five retries without a network
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _quantization(model: ModelConfig, dtype: torch.dtype) -> Any:
    """bitsandbytes' settings for `model.quantization`, or None."""
    if model.quantization == "none":
        return None
    try:
        from transformers import BitsAndBytesConfig
    except ImportError as error:
        raise ModelError(f"model.quantization: {model.quantization} needs bitsandbytes ({error})") from error
    if model.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    return BitsAndBytesConfig(load_in_8bit=True)


def _keep_one_layout(model: torch.nn.Module) -> None:
    """Keep 4-bit weights on a CPU in the layout they were quantised in.

    On CPUs with AVX512-BF16, bitsandbytes repacks a layer at its first forward without gradients and computes it in
    bf16 from then on. Training, evaluation and chat would then disagree, and a run that evaluated midway would differ
    from one that did not.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - an attribute only this class has


def _checked_path(name: str) -> str:
    """`resolve_name`, after refusing what can be seen to be wrong without loading."""
    path = resolve_name(name)
    folder = Path(path)
    looks_like_a_path = (
        folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or " " in name
        or ("/" in name and folder.parent.is_dir())
    )  # fmt: skip
    if name != "tiny" and looks_like_a_path and not folder.is_dir():
        raise ModelError(
            f"model.name: {name} is no folder; give a model folder, a Hub id like Qwen/Qwen3-0.6B, or tiny"
        )
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.name: {name} holds no config.json, so it is no model folder")
        if not list(folder.glob("*.safetensors")) and (pickled := [*folder.glob("*.bin"), *folder.glob("*.pt*")]):
            raise ModelError(
                f"model.name: {name} holds pickled weights ({pickled[0].name}), which can run code when read; "
                "lmtune reads safetensors only: convert them with the safetensors tools, or ask its author"
            )
    return path


def _model_error(model: ModelConfig, part: str, error: Exception) -> ModelError:
    """A `ModelError` that says in one paragraph what failed and what to do about it."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else text[:297] + "…"
    lower = text.lower()
    if "trust_remote_code" in lower or "custom code" in lower:
        hint = "this model needs code from its repository, which lmtune never runs; use a model built into transformers"
    elif "gated" in lower or "401" in lower or "403" in lower:
        hint = "accept its conditions on the Hub, then log in with `hf auth login`"
    elif any(word in lower for word in ("connect", "offline", "resolve", "timed out", "is not a local folder")):
        hint = "check the spelling (user/name) and the network; a model that was loaded once is found offline too"
    elif "memory" in lower:
        hint = "try model.quantization=nf4, or a smaller model"
    else:
        hint = "check that the folder or repository holds a complete causal language model"
    return ModelError(f"model.name: cannot load the {part} of {model.name}: {type(error).__name__}: {text}\n  {hint}")
