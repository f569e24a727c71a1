"""A base model and its tokenizer: Hub id, folder, GGUF file or `tiny`; unquantized, nf4 or int8; GPU or CPU alike.

Only safetensors and GGUF are read, and code of a model repository never runs. What a user can fix becomes a
`ModelError`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmtune.config.schema import ModelConfig
from lmtune.errors import LmtuneError, ModelError, is_failure
from lmtune.io.atomic import cache_folder, get_or_build, key_of
from lmtune.io.console import err, progress, warn
from lmtune.io.text import one_line
from lmtune.models.device import BF16_GAIN, bf16_speedup, default_device, free_memory
from lmtune.models.gguf import gguf_digest, gguf_folder, gguf_parameters, is_gguf
from lmtune.models.head import Head, prepare_head
from lmtune.models.libraries import quiet_libraries
from lmtune.models.offload import (
    LayerStream,
    MappedFiles,
    base_bytes,
    forget_mapped,
    mapped_files,
    reason_to_stream,
    stream_for,
)
from lmtune.models.structure import config_and_class, decoder_layers, empty_model
from lmtune.models.validate import (
    ADAPTER_CONFIG,
    CONFIG,
    INDEX,
    WEIGHTS,
    adapter_beside,
    check_base,
    check_loaded,
    check_weights,
    tokenizer_problem,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SIZES = 1024, 4096  # hidden and intermediate, where a model's are not known
_STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CACHED_FROM_BYTES = 200 * 2**20  # of stored weights; less is quantized in a second or two
_CACHED_MODELS = 3
_SHARD = "500MB"
_HEAD_WEIGHT = "score.weight"  # of a sequence classifier
_SAMPLES, _SAMPLE_BYTES = 64, 4096  # of each file, for the fingerprint
# What to do about an error of transformers, by words in its text
_HINTS = {
    ("trust_remote_code", "custom code"): "this model needs code from its repository, which lmtune never runs; use a "
    "model built into transformers",
    ("gated", "401", "403"): "accept its conditions on the Hub, then log in with `hf auth login`",
    ("connect", "offline", "resolve", "timed out", "is not a local folder"): "check the spelling (user/name) and the "
    "network; a model that was loaded once is found offline too, a mirror by HF_ENDPOINT, and a folder or GGUF file of "
    "yours needs no network",
    ("bitsandbytes",): "bitsandbytes does not work here; see `lmtune doctor`, or set model.quantization=none",
    ("memory",): "set model.quantization=nf4, or use a smaller model",
}


def load_tokenizer(model: ModelConfig, alone: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of `model`.

    Args:
        model: name and revision.
        alone: no model will be loaded after it, so a folder need not hold weights.

    Raises:
        ModelError: it cannot be found or read.
    """
    from transformers import AutoTokenizer

    quiet_libraries()
    path = checked_path(model.name, alone)
    try:
        with progress(f"loading the tokenizer of {model.name}"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                path, revision=model.revision, trust_remote_code=False
            )
    except BaseException as error:
        if not is_failure(error):
            raise
        raise _model_error(model, "tokenizer", error) from error
    if problem := tokenizer_problem(tokenizer):
        raise ModelError(f"model.name: {model.name}: {problem}")
    return tokenizer


def load_model(
    model: ModelConfig, device: torch.device | str | None = None, head: Head | None = None, to_shard: bool = False
) -> PreTrainedModel:  # fmt: skip
    """The base model with frozen weights, in evaluation mode.

    Args:
        model: name, revision, quantization and dtype.
        device: where to; by default `default_device()`.
        head: make a classifier of it; its head, in fp32, is new where the stored model has no head of these outputs.
        to_shard: it will be sharded layer by layer; until then its layers are in mapped files, whatever its size.

    Raises:
        ModelError: the model cannot be found, read, or held in the quantization asked for.
    """
    quiet_libraries()
    device = torch.device(device) if device is not None else default_device()
    path = checked_path(model.name)
    if model.quantization != "none":
        check_bitsandbytes(model.quantization)
    dtype = dtype_of(model, device)
    quantization = "" if model.quantization == "none" else f" in {model.quantization}"
    before = mapped_files()
    try:
        stream = _stream_to_shard(model, path, head) if to_shard else _stream(model, path, dtype, device, head)
        streaming = contextlib.nullcontext() if stream is None else stream.loading()
        with progress(f"loading {model.name}{quantization}"), streaming:
            loaded = _load_cached_or_quantize(model, path, dtype, device, head, stream)
        if stream is not None:
            (stream.hold if to_shard else stream.attach)(loaded)
        elif quantization:
            forget_mapped(before)  # what was read to be quantized
    except LmtuneError:
        raise
    except Exception as error:
        if _stored_file(model, ADAPTER_CONFIG):
            raise adapter_beside(model.name) from error
        if stored := _stored_file(model, WEIGHTS) or _stored_file(model, INDEX):
            check_weights(model.name, stored.parent)
        raise _model_error(model, "weights", error) from error
    if not Path(path).is_dir():  # a folder was looked at before
        check_weights(model.name, weight_files(model)[0].parent)
    fit_head(model, loaded, head)
    loaded.config._name_or_path = path
    loaded.requires_grad_(False)
    _disable_cpu_repacking(loaded)
    return loaded.eval()


def _stream(
    model: ModelConfig, path: str, dtype: torch.dtype, device: torch.device, head: Head | None
) -> LayerStream | None:  # fmt: skip
    """What brings the layers of a base in and out, with a line that says why; None where the base is held whole."""
    free, stored = free_memory(device), stored_parameters(model)
    if model.offload == "none" or (
        stored is not None and reason_to_stream(model, stored * dtype.itemsize, free) is None
    ):  # fmt: skip
        return None
    empty = empty_model(path, model.revision, head)
    if (reason := reason_to_stream(model, base_bytes(empty, model.quantization, dtype), free)) is None:
        return None
    err.print(f"offload: {model.resident_layers} layers of the base are in memory at once: {reason}")
    return stream_for(model, empty, device)


def _stream_to_shard(model: ModelConfig, path: str, head: Head | None) -> LayerStream | None:
    """What brings one layer after the other to be sharded; None without a list of layers, which cannot be."""
    has_layers = decoder_layers(empty_model(path, model.revision, head)) is not None
    return LayerStream(MappedFiles(), 1) if has_layers else None


def fit_head(model: ModelConfig, loaded: PreTrainedModel, head: Head | None) -> None:
    """Give a classifier the head that `head` says, or its stored one; a language model is left as it is."""
    if (found := head or stored_head(model)) is not None:
        is_stored = head is None or _is_of_stored(model, head)
        prepare_head(loaded, found, _stored_tensor(model, _HEAD_WEIGHT) if is_stored else None)


def compute_dtype(device: torch.device, setting: str = "auto", sizes: tuple[int, int] = _SIZES) -> torch.dtype:
    """The dtype of the frozen weights and the forward pass.

    Args:
        device: where they are computed.
        setting: a name, or `auto`: bf16 where the device multiplies in it clearly faster than in fp32.
        sizes: of the model's largest weights, by which that is measured on a CPU.
    """
    if setting != "auto":
        return DTYPES[setting]
    return torch.bfloat16 if bf16_speedup(device, *sizes) >= BF16_GAIN else torch.float32


def dtype_of(model: ModelConfig, device: torch.device) -> torch.dtype:
    """`compute_dtype` of a model."""
    return compute_dtype(device, model.dtype, weight_sizes(model))


def describe_dtype(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """`bfloat16: this CPU multiplies in it 2.4 times as fast as in float32`: the dtype of a model, and why."""
    name = str(dtype).removeprefix("torch.")
    if model.dtype != "auto":
        return f"{name}: model.dtype"
    if dtype != dtype_of(model, device):
        return f"{name}: as this run began"
    if device.type == "cuda":
        return f"{name}: this GPU {'has' if dtype == torch.bfloat16 else 'does not have'} bfloat16"
    speedup = bf16_speedup(device, *weight_sizes(model))
    if speedup == 1:
        return f"{name}: a small model gains nothing from 16 bit"
    return f"{name}: this CPU multiplies in bfloat16 {speedup:.1f} times as fast as in float32"


def weight_sizes(model: ModelConfig) -> tuple[int, int]:
    """Hidden and intermediate size of a model, by its config; usual ones where that is not on this machine yet."""
    try:
        file = stored_files(model, [CONFIG]).get(CONFIG)
        tree = json.loads(file.read_text(encoding="utf-8")) if file else {}
        tree = tree.get("text_config", tree)
        hidden = int(tree.get("hidden_size", tree.get("n_embd", _SIZES[0])))
        return hidden, int(tree.get("intermediate_size") or 4 * hidden)
    except (ModelError, OSError, ValueError, TypeError, AttributeError):  # `load_model` names what is wrong with it
        return _SIZES


def _from_pretrained(
    path: str, revision: str | None, dtype: torch.dtype, device: torch.device, quantization: Any, head: Head | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and which weights were missing."""
    config, kind = config_and_class(path, revision, head)
    settings = {} if quantization is None else {"quantization_config": quantization}  # None would undo the stored one
    loaded: tuple[PreTrainedModel, dict[str, Any]] = kind.from_pretrained(
        path, config=config, revision=revision, dtype=dtype, device_map={"": device}, trust_remote_code=False,
        use_safetensors=True, ignore_mismatched_sizes=True,  # which `check_loaded` names
        output_loading_info=True, **settings,
    )  # fmt: skip
    return loaded


def _quantization(model: ModelConfig, dtype: torch.dtype, head: Head | None) -> Any:
    """bitsandbytes' settings for `model.quantization`, or None."""
    if model.quantization == "none":
        return None
    from transformers import BitsAndBytesConfig

    is_classifier = (head or stored_head(model)) is not None
    kept = {"llm_int8_skip_modules": [_HEAD_WEIGHT.partition(".")[0]]} if is_classifier else {}
    if model.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype, **kept,
        )  # fmt: skip
    return BitsAndBytesConfig(load_in_8bit=True, **kept)


def _disable_cpu_repacking(model: torch.nn.Module) -> None:
    """Keep 4-bit weights on a CPU in the layout they were quantized in.

    On CPUs with AVX512-BF16, bitsandbytes repacks a layer at its first forward without gradients and computes it in
    bf16 from then on. Training, evaluation and chat would then disagree, and a run that evaluated midway would differ
    from one that did not.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - an attribute only this class has


# --- the cache of quantized bases


def _load_cached_or_quantize(
    model: ModelConfig, path: str, dtype: torch.dtype, device: torch.device, head: Head | None,
    stream: LayerStream | None,
) -> PreTrainedModel:  # fmt: skip
    """The base from the cache, or quantized now; of processes that start at once, one does it for all."""
    made: list[PreTrainedModel] = []

    def load() -> PreTrainedModel:
        settings = _quantization(model, dtype, head)
        loaded, info = _from_pretrained(path, model.revision, dtype, device, settings, head)
        check_loaded(model, loaded, info, head is not None, None if stream is None else stream.holding)
        made.append(loaded)
        return loaded

    if (key := _cache_key(model, dtype, device, head)) is None:
        return load()
    try:
        entry = get_or_build(
            cache_folder() / "quantized", key,
            lambda folder: load().save_pretrained(folder, max_shard_size=_SHARD),  # one at a time is in memory
            keep=_CACHED_MODELS,
        )  # fmt: skip
        return made[0] if made else _from_pretrained(str(entry), None, dtype, device, None, head)[0]
    except Exception as error:  # a full disk, or a config that transformers reads but does not write
        if isinstance(error, ModelError) or not (made or isinstance(error, LmtuneError)):
            raise
        warn(f"the quantized base is not kept for the next start: {error}")
        return made[0] if made else load()


def _cache_key(model: ModelConfig, dtype: torch.dtype, device: torch.device, head: Head | None) -> str | None:
    """The name of this base in the cache, or None where it is not worth it or the weights are not downloaded yet.

    Quantizing to 4 bit takes a CPU a second for 24 million weights; in 8 bit it takes almost nothing, and a GPU
    quantizes faster than a disk reads.
    """
    if device.type != "cpu" or model.quantization != "nf4":
        return None
    try:
        files = [file.resolve() for file in weight_files(model)]
    except ModelError:
        return None
    if sum(file.stat().st_size for file in files) < _CACHED_FROM_BYTES:
        return None
    # the fingerprint reads samples of large files: a file that was written again is another one
    written = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    configs = stored_files(model, (CONFIG, "generation_config.json"))
    texts = {name: file.read_text(encoding="utf-8") for name, file in configs.items()}
    if "quantization_config" in texts.get(CONFIG, ""):  # stored in few bits already
        return None
    versions = [version("transformers"), version("bitsandbytes")]
    settings = _quantization(model, dtype, head).to_dict()
    more = [] if head is None else [head.keys()]
    return key_of(base_fingerprint(model), written, texts, settings, str(dtype), versions, *more)


# --- the base's files


def resolve_name(name: str, with_weights: bool = False) -> str:
    """What transformers should load for `model.name`: a folder for `tiny` and for a GGUF file, else the name itself.

    Args:
        name: as `model.name` gives it.
        with_weights: of a GGUF file, whether the folder must hold weights: to dequantize them takes time and disk.
    """
    if name == "tiny":
        from lmtune.demo import tiny_path

        return str(tiny_path())
    return str(gguf_folder(name, with_weights)) if is_gguf(name) else name


def weight_files(model: ModelConfig) -> list[Path]:
    """The safetensors files that `load_model` reads, in order; for a Hub id those in the local cache.

    Raises:
        ModelError: there are none.
    """
    if single := _stored_file(model, WEIGHTS):
        return [single]
    if index := _stored_file(model, INDEX):
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [index.with_name(shard) for shard in shards]
    raise ModelError(f"model.name: {model.name}: no {WEIGHTS}; lmtune reads safetensors only")


def stored_files(model: ModelConfig, names: Iterable[str]) -> dict[str, Path]:
    """Those of a base's files that are there: in its folder, or in the Hub's local cache."""
    return {name: file for name in names if (file := _stored_file(model, name))}


def stored_head(model: ModelConfig) -> Head | None:
    """The head of a stored sequence classifier; None for a language model."""
    file = stored_files(model, [CONFIG]).get(CONFIG)
    return None if file is None else Head.of_config(json.loads(file.read_text(encoding="utf-8")))


def _is_of_stored(model: ModelConfig, head: Head) -> bool:
    """Whether a stored classifier has a head of these outputs."""
    stored = stored_head(model)
    return stored is not None and (stored.kind, stored.labels) == (head.kind, head.labels)


def _stored_tensor(model: ModelConfig, name: str) -> torch.Tensor | None:
    """A tensor of the stored weights, in its stored dtype; None where none has this name."""
    from safetensors import safe_open

    for path in weight_files(model):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 - not a dict
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
    return None


def stored_parameters(model: ModelConfig) -> int | None:
    """How many parameters the headers of the weights name; None if they are not on this machine."""
    from safetensors import safe_open

    if is_gguf(model.name):
        return gguf_parameters(model.name)
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
        slices = (file.get_slice(name) for name in file.keys())  # noqa: SIM118 - not a dict
        first = next((tensor for tensor in slices if len(tensor.get_shape()) == 2), None)
        return _STORED_DTYPES.get(first.get_dtype(), torch.float32) if first is not None else torch.float32


def base_fingerprint(model: ModelConfig) -> str:
    """32 hex digits that stand for the stored weights of `model`, whatever the quantization they are loaded in."""
    if is_gguf(model.name):
        return gguf_digest(Path(model.name).expanduser())[:32]
    digest = hashlib.sha256()
    for path in weight_files(model):
        digest.update(_file_digest(path))
    return digest.hexdigest()[:32]


def _file_digest(path: Path) -> bytes:
    """Of the header, the size, and samples of the content, so that 100 GB take no time."""
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


def _stored_file(model: ModelConfig, name: str) -> Path | None:
    """A file of the model's folder, or of its repository in the Hub's local cache."""
    from transformers.utils import cached_file

    path = resolve_name(model.name, with_weights=name in (WEIGHTS, INDEX))
    try:
        file = cached_file(
            path, name, revision=model.revision, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False, local_files_only=not Path(path).is_dir(),
        )  # fmt: skip
    except OSError as error:
        raise _model_error(model, "weights", error) from error
    return Path(file) if file else None


def checked_path(name: str, tokenizer_only: bool = False) -> str:
    """`resolve_name`, after what can be seen without loading was checked; a Hub id is not looked at.

    Raises:
        ModelError: no such folder, or with every problem of its files.
    """
    path = resolve_name(name, with_weights=not tokenizer_only)
    folder = Path(path)
    if folder.is_dir():
        check_base(name, folder, tokenizer_only)
    elif (
        folder.is_file() or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or " " in name
        or ("/" in name and folder.parent.is_dir())
    ):  # fmt: skip
        what = "a file" if folder.is_file() else "no such folder"
        raise ModelError(
            f"model.name: {name}: {what}; expected a model folder, a GGUF file, a Hub id like Qwen/Qwen3-0.6B, or tiny"
        )
    return path


# --- errors of the libraries


def check_bitsandbytes(quantization: str) -> None:
    """Make sure that bitsandbytes is there for `nf4` and `int8`, and in no case installed but broken: PEFT imports it.

    Raises:
        ModelError: with the ways out.
    """
    quiet_libraries()
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:
        is_absent = isinstance(error, ModuleNotFoundError) and error.name == "bitsandbytes"
        if is_absent and quantization == "none":
            return
        fault, fix = "is not installed", "`pip install bitsandbytes`"
        if not is_absent:
            fault = f"cannot be imported ({type(error).__name__}: {one_line(error)})"
            fix = "`pip install --force-reinstall bitsandbytes`"
        other = "remove it" if quantization == "none" else "set model.quantization=none"
        raise ModelError(f"model.quantization: {quantization}: bitsandbytes {fault}; {fix}, or {other}") from error


def _model_error(model: ModelConfig, part: str, error: BaseException) -> ModelError:
    """A `ModelError` that says what failed and what to do about it."""
    text = one_line(error)
    hint = "check that the folder or repository holds a complete causal language model"
    if part == "tokenizer":
        hint = "check tokenizer.json, tokenizer_config.json and config.json, or download them again"
    hint = next((fix for words, fix in _HINTS.items() if any(word in text.lower() for word in words)), hint)
    return ModelError(f"model.name: cannot load the {part} of {model.name}: {type(error).__name__}: {text}\n  {hint}")
