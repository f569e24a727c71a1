"""Tiny random models of each family that can be written as GGUF, with weights far enough from zero to disagree."""

from __future__ import annotations

from typing import Any

import torch

_SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"head_dim": 16, "tie_word_embeddings": False}),
    "llama3": ("LlamaConfig", {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"head_dim": 32, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3": ("Gemma3TextConfig", _GEMMA),
    "phi3": ("Phi3Config", {"num_key_value_heads": 4, "pad_token_id": 0, "sliding_window": None}),
    "gpt_oss": (
        "GptOssConfig",
        {
            "head_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "rope_parameters": _YARN,
        },
    ),
}  # fmt: skip


def family_config(family: str, vocab_size: int, **changes: Any) -> Any:
    """The config of a tiny model of a family."""
    import transformers

    name, own = FAMILIES[family]
    return getattr(transformers, name)(**{**_SHAPE, **own, "vocab_size": vocab_size, **changes})


def family_model(family: str, vocab_size: int, **changes: Any) -> Any:
    """A tiny random model of a family."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(family, vocab_size, **changes)).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.15)
            elif "norm" in name:
                weight.add_(0.2 * torch.randn_like(weight))
            else:
                weight.normal_(0, 0.3)
    return model
