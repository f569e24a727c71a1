"""A base in a GGUF file, the format of llama.cpp and Ollama, as a plain model folder that transformers loads.

    folder = gguf_folder("model.gguf")                    # config, tokenizer, chat template: seconds
    folder = gguf_folder("model.gguf", with_weights=True) # and model.safetensors, dequantized

transformers reads the file once and the folder stays in the cache, so that every command takes such a base like any
other. Weights keep the float type of the file; those in fewer bits become bf16. What transformers' reader leaves out of
the config is completed (the size of a head, the rotary embedding of Llama 3); a file with a rotary embedding beyond
that is refused: the model would run, and say other things (format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmtune.config.schema import ModelConfig
from lmtune.errors import ModelError, is_failure
from lmtune.io.atomic import cache_folder, get_or_build, key_of
from lmtune.io.console import progress
from lmtune.io.text import one_line
from lmtune.models.libraries import quiet_libraries
from lmtune.models.validate import CONFIG, check_loaded, text_problem

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_KEPT = {"gguf": 3, "gguf_texts": 20}  # folders of each kind in the cache
_SAMPLES, _SAMPLE_BYTES = 256, 4096
_ENDS = ("eos", "eot", "eom")  # tokens that end a text, a turn, or a message before a tool's
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def is_gguf(name: str | os.PathLike[str]) -> bool:
    """Whether `model.name` is a GGUF file, by its ending."""
    return str(name).lower().endswith(".gguf")


def gguf_folder(name: str, with_weights: bool = False) -> Path:
    """The model folder that a GGUF file becomes, from the cache or made now.

    Args:
        name: the file, as `model.name` gives it.
        with_weights: whether weights are needed; without them this takes seconds, whatever the file's size.

    Raises:
        ModelError: the file is missing, damaged, or holds what cannot be trained over; or `gguf` is not installed.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise ModelError(f"model.name: {name}: no such file; expected a GGUF file, a model folder, a Hub id, or tiny")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"model.name: {name}: a GGUF file is read by the package gguf; `pip install gguf`")
    metadata = gguf_metadata(name, path)
    kind = "gguf" if with_weights else "gguf_texts"
    status = path.stat()
    key = key_of(gguf_digest(path), status.st_size, status.st_mtime_ns, version("transformers"), version("gguf"))

    def build(folder: Path) -> None:
        quiet_libraries()
        try:
            _build(name, path, metadata, folder, with_weights)
        except BaseException as error:
            if not is_failure(error) or isinstance(error, (ModelError, OSError)):
                raise
            raise ModelError(
                f"model.name: {name}: transformers cannot read it: {type(error).__name__}: {one_line(error)}\n  use "
                "the safetensors model that this file was made from"
            ) from error

    return get_or_build(cache_folder() / kind, key, build, keep=_KEPT[kind])


def gguf_metadata(name: str, path: Path) -> dict[str, Any]:
    """What the header of a file says, by its keys.

    Args:
        name: the file, as `model.name` gives it.
        path: where it is.

    Raises:
        ModelError: what can be seen without reading weights keeps it from being a base.
    """
    from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata

    if problem := text_problem(path, "GGUF"):
        raise ModelError(f"model.name: {problem}")
    try:
        metadata: dict[str, Any] = read_gguf_metadata(str(path))[0]
    except Exception as error:  # of any kind, where the numbers in a header are not what they should be
        raise ModelError(
            f"model.name: {name}: not a GGUF file, or cut off ({one_line(error)}); download it again"
        ) from error
    with contextlib.suppress(ValueError):  # a type of weights that this table does not know, and its reader may
        header = GgufHeader.from_file(str(path))
        needed = header.data_start + max((tensor.offset + tensor.nbytes for tensor in header.tensors), default=0)
        if needed > (size := path.stat().st_size):
            raise ModelError(f"model.name: {name}: cut off after {size:,} of {needed:,} bytes; download it again")
    if metadata.get("split.count", 1) > 1:
        raise ModelError(
            f"model.name: {name}: one of {metadata['split.count']} parts; join them with llama.cpp's "
            "`llama-gguf-split --merge`"
        )
    if (kind := metadata.get("general.type", "model")) != "model":
        raise ModelError(f"model.name: {name}: its general.type is {kind}; expected the file of a whole model")
    return metadata


def gguf_digest(path: Path) -> str:
    """SHA-256, in hex, of samples of a file and its size, so that 100 GB take no time."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for index in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    digest.update(str(size).encode())
    return digest.hexdigest()


def gguf_parameters(name: str) -> int:
    """How many parameters the file holds, by its header."""
    from transformers.integrations.gguf.reader import GgufHeader

    header = GgufHeader.from_file(str(Path(name).expanduser()))
    return sum(math.prod(tensor.shape) for tensor in header.tensors)


def _build(name: str, path: Path, metadata: dict[str, Any], folder: Path, with_weights: bool) -> None:
    """Write the model folder."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
    with progress(f"reading the tokenizer of {path.name}"):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **place)
        config = AutoConfig.from_pretrained(path.parent, **place)
    tokenizer.save_pretrained(folder)
    if (head_dim := metadata.get(f"{metadata['general.architecture']}.attention.key_length")) and hasattr(
        config, "head_dim"
    ):
        config.head_dim = head_dim
    _complete_rotation(path, metadata, config)
    dtype = _dtype(path)
    if with_weights:
        with progress(f"reading {path.name}"):
            model, info = AutoModelForCausalLM.from_pretrained(
                path.parent, config=config, dtype=dtype, quantization_config=GgufConfig(dequantize=True),
                ignore_mismatched_sizes=True, output_loading_info=True, **place,
            )  # fmt: skip
        model.hf_quantizer = None  # its weights are plain by now, and saving would be refused
        check_loaded(ModelConfig(name=name, quantization="none"), model, info)
        model.save_pretrained(folder, max_shard_size="4GB")
        config = model.config
    else:
        with torch.device("meta"):
            config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    tree = {key: value for key, value in config.to_diff_dict().items() if not key.startswith("_")}
    tree.pop("quantization_config", None)
    _write(folder / CONFIG, {**tree, "dtype": str(dtype).removeprefix("torch.")})
    ends = [metadata.get(f"tokenizer.ggml.{end}_token_id") for end in _ENDS]
    stated = {f"{part}_token_id": getattr(config, f"{part}_token_id", None) for part in ("bos", "pad")}
    _write(
        folder / "generation_config.json",
        {key: value for key, value in stated.items() if value is not None}
        | {"eos_token_id": list(dict.fromkeys(end for end in ends if end is not None))},
    )


def _dtype(path: Path) -> torch.dtype:
    """The type in which the weights are kept."""
    from transformers.integrations.gguf.reader import GgufHeader

    with contextlib.suppress(ValueError):
        found: torch.dtype | None = GgufHeader.from_file(str(path)).dtype
        return found or torch.bfloat16
    return torch.bfloat16


def _complete_rotation(path: Path, metadata: dict[str, Any], config: PretrainedConfig) -> None:
    """Give `config` the rotary embedding that the file states beyond its base frequency.

    llama.cpp stores Llama 3's as one factor for each frequency, which transformers' reader leaves out.
    """
    rope = dict(config.rope_parameters or {}) if hasattr(config, "rope_parameters") else {}
    architecture = metadata["general.architecture"]
    kind = metadata.get(f"{architecture}.rope.scaling.type", "none")
    factors = _rotary_factors(path)
    if factors is not None and "rope_theta" in rope:
        scale = float(factors.max())
        wavelengths = 2 * math.pi * rope["rope_theta"] ** (torch.arange(len(factors)) / len(factors))
        low, high, original = _LLAMA3.values()
        share = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
        if torch.allclose(1 / ((1 - share) / scale + share), factors, rtol=1e-3):
            config.rope_parameters = {**rope, "rope_type": "llama3", "factor": scale, **_LLAMA3}
            return
    if factors is not None or (kind != "none" and rope.get("rope_type", "default") == "default"):
        what = "rope_freqs.weight" if factors is not None else f"rope.scaling.type {kind}"
        raise ModelError(
            f"model.name: {path.name}: transformers' reader of GGUF leaves out its {what}, without which the model "
            "reads long texts wrongly; use the safetensors model that this file was made from"
        )


def _rotary_factors(path: Path) -> torch.Tensor | None:
    """`[head_dim / 2]`: by how much each rotary frequency is divided; None where the file has none."""
    from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict

    with contextlib.suppress(ValueError):
        tensors = load_gguf_state_dict(GgufHeader.from_file(str(path)))
        for name, tensor in tensors.items():
            if re.fullmatch(r"rope_(freqs|factors_\w+)\.weight", name):
                factors: torch.Tensor = tensor[...].float()
                return factors
    return None


def _write(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
