"""A plain model folder, or an adapter, as a GGUF file, which llama.cpp, Ollama and LM Studio read.

    write_model(Path("runs/support/merged"), Path("support.gguf"), "q4_k_m")
    write_adapter(Path("runs/support/adapter"), base_config, Path("support-lora.gguf"))

Tensors are read, converted and written one after another, so that memory holds one. Weights of one dimension stay in
fp32, as llama.cpp wants it; what a block does not fit keeps 16 bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from lmtune.errors import ModelError
from lmtune.export.base import Kind
from lmtune.export.gguf_models import Architecture, Config, architecture, heads_of, pair_rows
from lmtune.export.gguf_tokenizer import tokenizer_keys
from lmtune.io.atomic import new_files
from lmtune.io.console import progress
from lmtune.models.model_folder import GENERATION, StoredWeights, read_tree
from lmtune.models.tuning.adapter_files import WEIGHTS, check_adapter

_FILE_TYPES: dict[Kind, int] = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q8_0": 7,
    "q5_0": 8,
    "q4_k_m": 15,
    "q6_k": 18,
    "bf16": 32,
}  # of llama.cpp
_BEFORE = "base_model.model."
_MORE = re.compile(r"blk\.(\d+)\.(attn_v|ffn_down)\.weight")  # of which q4_k_m keeps some in 6 bits


@dataclass(frozen=True)
class Written:
    """What a file holds.

    Attributes:
        path: the file.
        architecture: llama.cpp's.
        num_bytes: of the file.
        kept: weights that did not fit the blocks of the type, and are in 16 bits.
        has_template: whether it holds a chat template.
    """

    path: Path
    architecture: str
    num_bytes: int
    kept: int = 0
    has_template: bool = False


def write_model(folder: Path, output: Path, kind: Kind, name: str) -> Written:
    """Write the model in `folder` with its tokenizer, template and stop tokens.

    Args:
        folder: config, weights in safetensors, tokenizer, generation config.
        output: the file, which must not be there.
        kind: the type of its weights.
        name: of the model, for people.

    Raises:
        ModelError: GGUF cannot say what this model is, or `gguf` is not installed.
        ConfigError: `output` is there already.
    """
    from transformers import AutoConfig, AutoTokenizer

    _require_package()
    whole = AutoConfig.from_pretrained(folder)
    config: Any = whole.get_text_config()
    if config is not whole:
        raise ModelError(
            f"{folder}: model_type {whole.model_type} has parts beside the text model, which lmtune cannot write"
        )
    if not str((whole.architectures or [""])[0]).endswith("ForCausalLM"):
        raise ModelError(
            f"{folder}: {(whole.architectures or ['no architecture'])[0]}; only language models can be written"
        )
    arch = architecture(config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stops = read_tree(folder / GENERATION).get("eos_token_id")
    stop_ids = [stops] if isinstance(stops, int) else list(stops or ())
    template = tokenizer.chat_template
    keys = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": 2,
        **{f"{arch.name}.{key}": value for key, value in arch.settings(config).items()},
        **tokenizer_keys(tokenizer, config.vocab_size, stop_ids, template if isinstance(template, str) else None),
    }
    stored = StoredWeights(sorted(folder.glob("*.safetensors")))
    kept: set[str] = set()

    def tensors(read: bool) -> Iterator[tuple[str, torch.Tensor]]:
        yield from arch.tensors(config)
        for weight, entry in stored.entries.items():
            is_head = config.tie_word_embeddings and weight == "lm_head.weight"
            if not is_head and not weight.endswith("rotary_emb.inv_freq"):
                value = entry.read() if read else torch.empty(entry.shape, dtype=entry.dtype, device="meta")
                yield from arch.convert(weight, value, config)

    def type_of(tensor: str, shape: Sequence[int]) -> str:
        chosen = _type_of(tensor, shape, kind, config.num_hidden_layers)
        if chosen == "f16" != kind:
            kept.add(tensor)
        return chosen

    _write(output, arch.name, keys, tensors, type_of)
    return Written(output, arch.name, output.stat().st_size, len(kept), "tokenizer.chat_template" in keys)


def kind_of_file_type(number: object) -> Kind | None:
    """The type of most weights in a file, by its `general.file_type`; None for one that lmtune does not write."""
    return next((kind for kind, known in _FILE_TYPES.items() if known == number), None)


def write_adapter(folder: Path, config: Config, output: Path, name: str) -> Written:
    """Write a LoRA adapter for llama.cpp's `--lora`, beside the base of `config`.

    Such a file holds neither tokenizer, template nor stop tokens: those of the base's file are used.

    Raises:
        ModelError: the adapter learns what such a file cannot hold, or `gguf` is not installed.
    """
    _require_package()
    settings: Mapping[str, Any] = check_adapter(folder)
    arch = architecture(config)
    if settings.get("use_dora"):
        raise ModelError(f"{folder}: DoRA; llama.cpp's adapters have no magnitudes; export the merged model")
    alpha = float(settings["lora_alpha"])
    keys = {"general.type": "adapter", "general.name": name, "adapter.type": "lora", "adapter.lora.alpha": alpha}

    def tensors(read: bool) -> Iterator[tuple[str, torch.Tensor]]:  # small enough to be read twice
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            for key in sorted(file.keys()):
                yield _adapter_part(key, file.get_tensor(key), arch, config, settings)

    _write(output, arch.name, keys, tensors, lambda tensor, shape: "f32")
    return Written(output, arch.name, output.stat().st_size)


def _adapter_part(
    key: str, tensor: torch.Tensor, arch: Architecture, config: Config, settings: Mapping[str, Any]
) -> tuple[str, torch.Tensor]:
    """One of an adapter's two matrices under llama.cpp's name; there `alpha / rank` scales all, so that B takes what
    differs.

    Raises:
        ModelError: it is no matrix of LoRA on a linear layer.
    """
    found = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key.removeprefix(_BEFORE))
    if found is None or ".experts" in key:
        raise ModelError(f"{key}: llama.cpp's adapters hold LoRA on linear layers alone; export the merged model")
    module, half = found.groups()
    if half == "B":
        rank = tensor.shape[1]
        alpha = next(
            (
                value
                for name, value in settings.get("alpha_pattern", {}).items()
                if re.search(rf"(^|\.){name}$", module)
            ),
            settings["lora_alpha"],
        )
        wanted = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
        if (factor := wanted * rank / settings["lora_alpha"]) != 1:
            tensor = tensor.float() * factor
        if arch.permutes and module.endswith((".self_attn.q_proj", ".self_attn.k_proj")):
            tensor = pair_rows(tensor, heads_of(module, config))
    return f"{arch.rename(module, config)}.weight.lora_{half.lower()}", tensor


def _type_of(name: str, shape: Sequence[int], kind: Kind, layers: int) -> str:
    """The type of one weight."""
    if len(shape) == 1 or not name.endswith(".weight") or "ffn_gate_inp" in name:
        return "f32"
    wanted: str = kind
    if kind == "q4_k_m":
        wanted = "q4_k"
        if name == "output.weight" or (name == "token_embd.weight"):
            wanted = "q6_k"
        elif found := _MORE.fullmatch(name):
            layer, eighth = int(found[1]), layers // 8
            if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2:
                wanted = "q6_k"
    if wanted in ("q4_k", "q6_k") and shape[-1] % 256:
        wanted = "q8_0"
    return "f16" if wanted.startswith("q") and shape[-1] % 32 else wanted


def _write(
    output: Path, arch: str, keys: Mapping[str, Any], tensors: Callable[[bool], Iterator[tuple[str, torch.Tensor]]],
    type_of: Callable[[str, Sequence[int]], str],
) -> None:  # fmt: skip
    """Go through `tensors` twice: unread, for what the header says of them, then for their bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    with new_files(output) as staging:
        writer = GGUFWriter(staging / output.name, arch)
        for key, value in keys.items():
            _add_key(writer, key, value)
        count = 0
        for name, tensor in tensors(False):
            kind = GGMLQuantizationType[type_of(name, tensor.shape).upper()]
            weights, num_bytes = GGML_QUANT_SIZES[kind]  # of a block
            size = tensor.numel() // weights * num_bytes
            writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), size, kind)
            count += 1
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress(f"writing {output.name}", count, "tensors") as shown:
            for name, tensor in tensors(True):
                writer.write_tensor_data(_encoded(tensor, type_of(name, tensor.shape)))
                shown.advance(1)
        writer.close()


def _add_key(writer: Any, key: str, value: Any) -> None:
    """A key by the type of its value; numbers that are no fractions are unsigned, but for the kinds of tokens."""
    from gguf import GGUFValueType

    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        kind = {int: GGUFValueType.INT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}[type(value[0])]
        writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=kind)


def _encoded(tensor: torch.Tensor, kind: str) -> np.ndarray[Any, Any]:
    """The bytes of a tensor in a type."""
    from gguf import GGMLQuantizationType, quants

    from lmtune.export.k_quants import quantize_q4_k, quantize_q6_k

    if kind == "f16":
        half = tensor.to(torch.float16)
        if not torch.isfinite(half).all() and torch.isfinite(tensor).all():
            raise ModelError("a weight is too large for f16; write --type bf16, f32 or q8_0")
        return half.contiguous().numpy()
    if kind == "bf16":
        return tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    values = tensor.float().contiguous().numpy()
    own = {"q4_k": quantize_q4_k, "q6_k": quantize_q6_k}.get(kind)
    if own is not None:
        return own(values.reshape(-1, values.shape[-1])).reshape(*values.shape[:-1], -1)
    encoded: np.ndarray[Any, Any] = quants.quantize(values, GGMLQuantizationType[kind.upper()])
    return encoded


def _require_package() -> None:
    import importlib.util

    if importlib.util.find_spec("gguf") is None:
        raise ModelError("GGUF files are written by the package gguf; `pip install gguf`, or lmtune[gguf]")
