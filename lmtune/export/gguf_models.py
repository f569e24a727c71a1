"""What llama.cpp calls the parts of a model: its architecture, its settings, and each tensor's name and form.

    arch = architecture(config)                 # ModelError says why a model has none
    arch.settings(config)                       # the keys of the file, `llama.context_length` and the like
    for name, tensor in arch.convert("model.layers.0.self_attn.q_proj.weight", tensor): …

Each architecture is a table of what it does otherwise than Llama. Formats and names:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What a file cannot say, such as a sliding window in an
architecture that has none, is refused, for the model would run and say other things.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lmtune.errors import ModelError

Settings = dict[str, int | float | str | bool]
Named = Iterable[tuple[str, torch.Tensor]]


class Config(Protocol):
    """The text part of a transformers config: attributes by name, of which each architecture has its own."""

    model_type: str

    def __getattr__(self, name: str) -> Any: ...


@dataclass(frozen=True)
class Architecture:
    """How one family of models is written.

    Attributes:
        name: as llama.cpp calls it.
        extra: further settings, by their keys without the architecture.
        problem: why this model, of the family, cannot be written; None if it can.
        permutes: the rows of query and key are in pairs of neighbours, not in halves.
        norm_offset: what is added to the weights of norms, which transformers adds when it computes.
        split: a tensor that becomes several, or gets another form.
        has_window: whether llama.cpp knows a sliding window here.
    """

    name: str
    extra: Callable[[Config], Settings] = lambda config: {}
    problem: Callable[[Config], str | None] = lambda config: None
    permutes: bool = False
    norm_offset: float = 0.0
    split: Callable[[str, torch.Tensor], Named | None] = lambda name, tensor: None
    has_window: bool = False

    def settings(self, config: Config) -> Settings:
        """The keys of the file that describe the model, without the architecture before them."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        rope = _rope(config)
        window = None if self.has_window else _window(config)
        context = config.max_position_embeddings if window is None else min(config.max_position_embeddings, window)
        return {
            "context_length": context,
            "embedding_length": config.hidden_size,
            "block_count": config.num_hidden_layers,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": heads,
            "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
            "attention.key_length": head_dim,
            "attention.value_length": head_dim,
            "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
            "rope.freq_base": float(rope["rope_theta"]),
            "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
            "vocab_size": config.vocab_size,
            **_scaling(rope),
            **self.extra(config),
        }

    def tensors(self, config: Config) -> Named:
        """Tensors that the file has beside the weights: factors of the rotary embedding."""
        rope = _rope(config)
        if rope.get("rope_type") == "llama3":
            yield "rope_freqs.weight", _llama3_factors(config, rope)

    def convert(self, name: str, tensor: torch.Tensor, config: Config) -> Iterator[tuple[str, torch.Tensor]]:
        """A weight under llama.cpp's name and in its form; several where it is split.

        Raises:
            ModelError: the weight has no place in this architecture.
        """
        for part, piece in self.split(name, tensor) or [(name, tensor)]:
            where, _, kind = part.rpartition(".")
            if self.permutes and where.endswith((".self_attn.q_proj", ".self_attn.k_proj")):
                piece = pair_rows(piece, heads_of(where, config))
            if self.norm_offset and kind == "weight" and where.endswith("norm"):
                piece = piece.float() + self.norm_offset
            yield self.rename(where, config) + f".{kind}", piece

    def rename(self, module: str, config: Config) -> str:
        """llama.cpp's name of a module.

        Raises:
            ModelError: it has none.
        """
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        kind = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == self.name)
        found: str | None = get_tensor_name_map(kind, config.num_hidden_layers).get_name(module)
        if found is None:
            raise ModelError(f"{module}: llama.cpp's architecture {self.name} has no such part")
        return found


def architecture(config: Config) -> Architecture:
    """That of a model.

    Raises:
        ModelError: there is none, or the model is not as its family is there.
    """
    found = _ARCHITECTURES.get(config.model_type)
    if found is None:
        raise ModelError(
            f"model_type {config.model_type}: lmtune writes GGUF of {', '.join(_ARCHITECTURES)}; convert the merged "
            "folder with llama.cpp's convert_hf_to_gguf.py"
        )
    if problem := found.problem(config) or _rope_problem(config):
        raise ModelError(f"model_type {config.model_type}: {problem}; GGUF cannot say this, and the model would differ")
    return found


def heads_of(module: str, config: Config) -> int:
    """How many heads the rows of a query's or key's projection belong to."""
    heads: int = config.num_attention_heads
    return heads if module.endswith("q_proj") else getattr(config, "num_key_value_heads", None) or heads


def pair_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """`[rows, …]` whose halves rotate together in each head, as rows of which neighbours do."""
    rows = weight.shape[0]
    halves = weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


# --- rotary embeddings


def _rope(config: Config) -> dict[str, Any]:
    """The rotary embedding; of models with one for each kind of layer that of full attention."""
    rope = dict(config.rope_parameters or {})
    return dict(rope["full_attention"]) if "full_attention" in rope else rope


def _scaling(rope: Mapping[str, Any]) -> Settings:
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
            "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32.0),
            "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1.0),
        }
    return {}


def _rope_problem(config: Config) -> str | None:
    kind = _rope(config).get("rope_type", "default")
    known = ("default", "linear", "llama3", "yarn")
    return None if kind in known else f"rope_type {kind} is not written (only {', '.join(known)})"


def _llama3_factors(config: Config, rope: Mapping[str, Any]) -> torch.Tensor:
    """`[head_dim / 2]`: by how much each frequency is divided (https://github.com/meta-llama/llama-models, 3.1)."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    low, high, original = (
        rope[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    share = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    factors: torch.Tensor = 1 / ((1 - share) / rope["factor"] + share)
    return factors.float()


# --- what single architectures do otherwise


def _window(config: Config) -> int | None:
    """The sliding window of some layers; None where all see everything."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    is_used = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    return window if is_used else None


def _gemma2(config: Config) -> Settings:
    return {
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
        "attention.sliding_window": config.sliding_window,
    }


def _gemma_scale(config: Config) -> str | None:
    """llama.cpp scales queries by the size of a head."""
    wanted, is_same = config.query_pre_attn_scalar, config.query_pre_attn_scalar == config.head_dim
    return None if is_same else f"query_pre_attn_scalar is {wanted}, and head_dim {config.head_dim}"


def _gemma3(config: Config) -> Settings:
    local = config.rope_parameters.get("sliding_attention", {})
    return {
        "attention.sliding_window": config.sliding_window,
        "rope.freq_base_swa": float(local.get("rope_theta", 10_000.0)),
    }


def _gemma3_problem(config: Config) -> str | None:
    kinds = [
        "full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(len(config.layer_types))
    ]
    if list(config.layer_types) != kinds:
        return "its layers do not take turns of five with a sliding window and one without"
    local = config.rope_parameters.get("sliding_attention", {}).get("rope_theta", 10_000.0)
    return _gemma_scale(config) if local == 10_000.0 else f"the rotary base of its sliding layers is {local:g}"


def _gpt_oss(config: Config) -> Settings:
    return {
        "attention.sliding_window": config.sliding_window,
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.intermediate_size,
    }


def _gpt_oss_experts(name: str, tensor: torch.Tensor) -> Named | None:
    """The experts' gate and up, which are columns in turn, as two; weights `[E, out, in]`."""
    where, _, kind = name.rpartition(".mlp.experts.")
    if name.endswith(".sinks"):
        return [(f"{name}.weight", tensor)]
    if not where:
        return None
    part = "bias" if kind.endswith("_bias") else "weight"
    turned = tensor if part == "bias" else tensor.transpose(1, 2)
    if kind.startswith("down_proj"):
        return [(f"{where}.mlp.experts.down_proj.{part}", turned.contiguous())]
    halves = {"gate_proj": turned[:, ::2], "up_proj": turned[:, 1::2]}
    return [(f"{where}.mlp.experts.{half}.{part}", piece.contiguous()) for half, piece in halves.items()]


_LLAMA = Architecture("llama", permutes=True)
_ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma2": Architecture(
        "gemma2", _gemma2, _gemma_scale, norm_offset=1.0, has_window=True,
    ),
    "gemma3_text": Architecture(
        "gemma3", _gemma3, _gemma3_problem, norm_offset=1.0, has_window=True,
    ),
    "phi3": Architecture("phi3"),
    "gpt_oss": Architecture(
        "gpt-oss", _gpt_oss, split=_gpt_oss_experts, has_window=True,
    ),
}  # fmt: skip
