"""Loading a base model and its tokenizer: Hub id, local folder or `tiny`; unquantised, nf4 or int8; GPU or CPU alike.

    model = load_model(ModelConfig(name="tiny", quantization="nf4"))

Only safetensors are read and code from a model repository is never run. What a user can mend (a misspelt name, no
network, pickled weights) becomes a `ModelError` that says how.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lmtune.config.schema import ModelConfig
from lmtune.errors import ModelError, is_failure
from lmtune.io.atomic import cache_folder, get_or_build, key_of, lookup, single_flight
from lmtune.io.console import progress, warn
from lmtune.models.device import default_device
from lmtune.models.libraries import quiet_libraries
from lmtune.models.validate import (
    ADAPTER,
    INDEX,
    WEIGHTS,
    adapter_beside,
    check_base,
    check_loaded,
    check_weights,
    tokenizer_fault,
    unreachable,
    unusable,
)

_CACHE = "quantized"
_CACHED_FROM_BYTES = 200 * 2**20  # of stored weights; less is quantised in a second or two
_CACHED_MODELS = 3

_HUB_PAGE = re.compile(r"https?://(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)/?")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_name(name: str) -> str:
    """What transformers should load for `model.name`: the packaged folder for `tiny`, else the name itself."""
    if name == "tiny":
        from lmtune.demo import tiny_path

        return str(tiny_path())
    return name


def compute_dtype(device: torch.device, setting: str = "auto") -> torch.dtype:
    """The dtype of the frozen weights and the forward pass.

    `auto` is bf16 on GPUs that have it and fp32 elsewhere: without AVX512-BF16 a bf16 matmul on a CPU is several times
    slower than fp32.
    """
    if setting != "auto":
        return DTYPES[setting]
    real_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if real_bf16 else torch.float32


def check_files(model: ModelConfig) -> None:
    """Look at a base's folder before anything reads it; a Hub id is not looked at.

    Raises:
        ModelError: with everything that is wrong with it.
    """
    _checked_path(model.name)


def load_tokenizer(model: ModelConfig, alone: bool = False) -> Any:
    """The tokenizer of `model`.

    Args:
        model: name and revision.
        alone: no model will be loaded after it, so a folder need not hold weights.

    Raises:
        ModelError: it cannot be found or read.
    """
    from transformers import AutoTokenizer

    quiet_libraries()
    path = _checked_path(model.name, alone)
    try:
        with progress(f"loading the tokenizer of {model.name}"):
            tokenizer = AutoTokenizer.from_pretrained(path, revision=model.revision, trust_remote_code=False)
    except BaseException as error:
        if not is_failure(error):
            raise
        if fault := tokenizer_fault(Path(path)):
            raise ModelError(f"model.name: {model.name}: {fault}") from error
        raise _model_error(model, "tokenizer", error) from error
    if fault := unusable(tokenizer):
        raise ModelError(f"model.name: {model.name}: {fault}")
    return tokenizer


def load_model(model: ModelConfig, device: torch.device | str | None = None) -> Any:
    """The base model with frozen weights, in evaluation mode, on `device`.

    Args:
        model: name, revision, quantization and dtype.
        device: where to; by default `default_device()`.

    Raises:
        ModelError: the model cannot be found, read, or held in the quantization asked for.
    """
    quiet_libraries()
    device = torch.device(device) if device is not None else default_device()
    path = _checked_path(model.name)
    if model.quantization in ("nf4", "int8"):
        check_bitsandbytes(model.quantization)
    dtype = compute_dtype(device, model.dtype)
    held = "" if model.quantization == "none" else f" in {model.quantization}"
    try:
        with progress(f"loading {model.name}{held}"):
            loaded = _kept_or_made(model, path, dtype, device)
    except ModelError:
        raise
    except Exception as error:
        if _stored_file(model, ADAPTER):
            raise adapter_beside(model.name) from error
        if stored := _stored_file(model, WEIGHTS) or _stored_file(model, INDEX):
            check_weights(model.name, stored.parent)
        raise _model_error(model, "weights", error) from error
    loaded.config._name_or_path = path
    loaded.requires_grad_(False)
    _keep_one_layout(loaded)
    return loaded.eval()


def _kept_or_made(model: ModelConfig, path: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The base from the cache, or made now; of processes that start at once, one makes it for all."""
    key = _cache_key(model, dtype, device)
    kept = _from_cache(key, dtype, device) if key else None
    if kept is not None:
        return kept
    with single_flight(cache_folder() / _CACHE, key) if key else contextlib.nullcontext():
        kept = _from_cache(key, dtype, device) if key else None  # another process may just have made it
        if kept is not None:
            return kept
        loaded, report = _from_pretrained(path, model.revision, dtype, device, _quantization(model, dtype))
        if not Path(path).is_dir():  # those of a folder were looked at before
            check_weights(model.name, weight_files(model)[0].parent)
        check_loaded(model, loaded, report)
        stored = getattr(getattr(loaded, "hf_quantizer", None), "pre_quantized", False)
        if (key := key or _cache_key(model, dtype, device)) and not stored:  # downloaded just now
            _remember(loaded, key)
        return loaded


def _from_pretrained(
    path: str, revision: str | None, dtype: torch.dtype, device: torch.device, quantization: Any
) -> tuple[Any, dict[str, Any]]:
    """The model, and which weights were missing."""
    from transformers import AutoModelForCausalLM

    settings = {} if quantization is None else {"quantization_config": quantization}  # None would undo the stored one
    loaded: tuple[Any, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(
        path, revision=revision, dtype=dtype, device_map={"": device}, trust_remote_code=False, use_safetensors=True,
        ignore_mismatched_sizes=True, output_loading_info=True, **settings,  # which `check_loaded` names
    )  # fmt: skip
    return loaded


def _cache_key(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """What stands for this base in 4 bit in lmtune's cache, or None where that is not worth it or not known yet.

    Quantising to 4 bit takes a CPU a second for 24 million weights; in 8 bit it takes almost nothing, and a GPU
    quantises faster than a disk reads.
    """
    if device.type != "cpu":
        return None
    from importlib.metadata import version

    try:
        files = [file.resolve() for file in weight_files(model)]
    except ModelError:  # not downloaded yet
        return None
    if model.quantization != "nf4" or sum(file.stat().st_size for file in files) < _CACHED_FROM_BYTES:
        return None
    # the fingerprint reads samples of large files: a file that was written again is another one
    written = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    configs = [_stored_file(model, name) for name in ("config.json", "generation_config.json")]
    texts = [file.read_text(encoding="utf-8") if file else None for file in configs]
    versions = [version("transformers"), version("bitsandbytes")]
    return key_of(base_fingerprint(model), written, texts, _quantization(model, dtype).to_dict(), str(dtype), versions)


def _from_cache(key: str, dtype: torch.dtype, device: torch.device) -> Any | None:
    """The quantised base as it was kept, or None: another process may just have made room there."""
    if (folder := lookup(cache_folder() / _CACHE, key)) is None:
        return None
    try:
        loaded, report = _from_pretrained(str(folder), None, dtype, device, None)
        if report["missing_keys"] or report["mismatched_keys"]:
            raise ValueError("its weights are not those of its config")
    except Exception as error:
        warn(f"the quantised base in the cache cannot be read, and is made again: {error}")
        return None
    return loaded


def _remember(loaded: Any, key: str) -> None:
    """Keep the quantised base in the cache; nothing depends on it."""
    try:
        get_or_build(cache_folder() / _CACHE, key, loaded.save_pretrained, keep=_CACHED_MODELS)
    except Exception as error:  # a full disk, or a config that transformers reads but does not write
        warn(f"the quantised base is not kept for the next start: {error}")


def weight_files(model: ModelConfig) -> list[Path]:
    """The safetensors files that `load_model` has read, in order; for a Hub id those in the local cache.

    Raises:
        ModelError: there are none.
    """
    if single := _stored_file(model, WEIGHTS):
        return [single]
    if index := _stored_file(model, INDEX):
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [index.with_name(shard) for shard in shards]
    raise ModelError(f"model.name: {model.name} has no model.safetensors; lmtune reads safetensors only")


def stored_files(model: ModelConfig, names: Iterable[str]) -> dict[str, Path]:
    """Those of a base's files that are there: in its folder, or in the Hub's local cache."""
    return {name: file for name in names if (file := _stored_file(model, name))}


def _stored_file(model: ModelConfig, name: str) -> Path | None:
    """A file of the model's folder, or of its repository in the Hub's local cache."""
    from transformers.utils import cached_file

    path = resolve_name(model.name)
    try:
        file = cached_file(
            path, name, revision=model.revision, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False, local_files_only=not Path(path).is_dir(),
        )  # fmt: skip
    except OSError as error:
        raise _model_error(model, "weights", error) from error
    return Path(file) if file else None


def stored_parameters(model: ModelConfig) -> int | None:
    """How many parameters the weights have, by the headers of their files; None if they are not on this machine."""
    from math import prod

    from safetensors import safe_open

    total = 0
    try:
        for path in weight_files(model):
            with safe_open(path, framework="pt") as file:
                total += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - not a dict
    except (ModelError, OSError):
        return None
    return total


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


def _quantization(model: ModelConfig, dtype: torch.dtype) -> Any:
    """bitsandbytes' settings for `model.quantization`, or None."""
    if model.quantization == "none":
        return None
    from transformers import BitsAndBytesConfig

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


def _checked_path(name: str, tokenizer_alone: bool = False) -> str:
    """`resolve_name`, after refusing what can be seen to be wrong without loading."""
    if fault := unreachable(name):
        raise ModelError(f"model.name: {fault}; give a model folder, a Hub id like Qwen/Qwen3-0.6B, or tiny")
    path = resolve_name(name)
    folder = Path(path)
    looks_like_a_path = (
        folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or " " in name
        or ("/" in name and folder.parent.is_dir())
    )  # fmt: skip
    if name != "tiny" and folder.is_file():
        raise ModelError(
            f"model.name: {name} is a file; give the folder that it is in, a Hub id like Qwen/Qwen3-0.6B, or tiny"
        )
    if name != "tiny" and looks_like_a_path and not folder.is_dir():
        page = _HUB_PAGE.fullmatch(name)
        give = f"its Hub id: {page[1]}" if page else "a model folder, a Hub id like Qwen/Qwen3-0.6B, or tiny"
        raise ModelError(f"model.name: {name} is no folder; give {give}")
    if name != "tiny" and folder.is_dir():
        check_base(name, folder, tokenizer_alone)
    return path


def _model_error(model: ModelConfig, part: str, error: BaseException) -> ModelError:
    """A `ModelError` that says in one paragraph what failed and what to do about it."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else text[:297] + "…"
    lower = text.lower()
    if "bitsandbytes" in lower and model.quantization in ("nf4", "int8"):
        return ModelError(
            f"model.quantization: bitsandbytes cannot hold {model.name} in {model.quantization} here: "
            f"{type(error).__name__}: {text}\n  `lmtune doctor` says what works, or set model.quantization=none"
        )
    if "bitsandbytes" in lower:
        hint = f"it is stored in the form of bitsandbytes, which does not work here; {INSTALL}, or see `lmtune doctor`"
    elif "trust_remote_code" in lower or "custom code" in lower:
        hint = "this model needs code from its repository, which lmtune never runs; use a model built into transformers"
    elif "gated" in lower or "401" in lower or "403" in lower:
        hint = "accept its conditions on the Hub, then log in with `hf auth login`"
    elif any(word in lower for word in ("connect", "offline", "resolve", "timed out", "is not a local folder")):
        hint = "check the spelling (user/name) and the network; a model that was loaded once is found offline too"
    elif "memory" in lower:
        hint = "try model.quantization=nf4, or a smaller model"
    elif part == "tokenizer":
        hint = "check tokenizer.json, tokenizer_config.json and config.json, or download them again"
    else:
        hint = "check that the folder or repository holds a complete causal language model"
    return ModelError(f"model.name: cannot load the {part} of {model.name}: {type(error).__name__}: {text}\n  {hint}")


_SAMPLES, _SAMPLE_BYTES = 64, 4096


def base_fingerprint(model: ModelConfig) -> str:
    """32 hex digits that stand for the stored weights of `model`, whatever the quantization they are loaded in."""
    digest = hashlib.sha256()
    for path in weight_files(model):
        digest.update(_file_digest(path))
    return digest.hexdigest()[:32]


def _file_digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        digest.update(file.read(min(header_bytes, size)))
        start = min(8 + header_bytes, size)
        if size - start <= _SAMPLES * _SAMPLE_BYTES:
            digest.update(file.read())
        else:
            for index in range(_SAMPLES):
                file.seek(start + (size - start - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    digest.update(str(size).encode())
    return digest.digest()


INSTALL = "`pip install bitsandbytes`"
_AGAIN = "install it again (`pip install --force-reinstall bitsandbytes`)"


def check_bitsandbytes(quantization: str) -> None:
    """Make sure that bitsandbytes is there for `nf4` and `int8`, and in no case installed but broken.

    Raises:
        ModelError: with both ways out.
    """
    quiet_libraries()
    needed = quantization in ("nf4", "int8")
    try:
        import bitsandbytes  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name == "bitsandbytes":
            if needed:
                raise ModelError(
                    f"model.quantization: {quantization} needs bitsandbytes, which is not installed; {INSTALL}, or set "
                    "model.quantization=none"
                ) from None
            return
        raise _broken(quantization, needed, error) from error
    except Exception as error:
        raise _broken(quantization, needed, error) from error


def _broken(quantization: str, needed: bool, error: Exception) -> ModelError:
    why = f"cannot be imported ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
    take_away = "take it away (`pip uninstall bitsandbytes`)"
    if needed:
        return ModelError(
            f"model.quantization: {quantization} needs bitsandbytes, which is installed but {why}; {_AGAIN}, or "
            f"{take_away} and set model.quantization=none"
        )
    return ModelError(f"bitsandbytes is installed but {why}, and PEFT imports it; {_AGAIN}, or {take_away}")
