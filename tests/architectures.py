"""Tiny random models of what people fine-tune, one for each architecture: its config, and nothing else of it."""

from __future__ import annotations

from typing import Any

import torch

from tests.tiny import SAVED_VOCABULARY

SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": SAVED_VOCABULARY, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
WINDOW = {"sliding_window": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4, "head_dim": 16,
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_expand": 2,
    "mamba_chunk_size": 16,
}  # fmt: skip

# Name in transformers: what its config holds beside SHAPE; `...` is a key of SHAPE that it does not have.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama4_text": {
        **LOCAL_EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 128, "attention_chunk_size": 8,
        "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0],
        "interleave_moe_layer_step": 2,
    },
    "mistral": WINDOW,
    "ministral3": {},
    "mixtral": LOCAL_EXPERTS,
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 128},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 128},
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": {**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 128},
    "gemma": {},
    "gemma2": {**WINDOW, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {**WINDOW, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16},
    "gemma3n_text": {
        **WINDOW, "layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": SAVED_VOCABULARY, "num_kv_shared_layers": 0, "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0, 0.0], "altup_num_inputs": 2,
    },
    "gemma4_text": {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {**LOCAL_EXPERTS, **WINDOW},
    "phi": {},
    "phi3": {},
    "phimoe": {**LOCAL_EXPERTS, **WINDOW},
    "olmo2": {},
    "olmo3": {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "olmoe": {**EXPERTS, "num_key_value_heads": 4},
    "granite": {"attention_multiplier": 0.25, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "granitemoe": LOCAL_EXPERTS,
    "granitemoehybrid": {**LOCAL_EXPERTS, **MAMBA, "layer_types": ["mamba", "attention"]},
    "cohere": {},
    "cohere2": {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "glm": {},
    "glm4": {},
    "glm4_moe": {**EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {
        **EXPERTS, **LATENT, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    },
    "smollm3": {},
    "ernie4_5": {},
    "ernie4_5_moe": {**EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "hunyuan_v1_dense": {},
    "exaone4": {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "seed_oss": {},
    "apertus": {},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "minimax_m2": {**LOCAL_EXPERTS, "rotary_dim": 16},
    "nemotron": {},
    "stablelm": {},
    "starcoder2": WINDOW,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_neox": {},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "falcon": {"head_dim": ..., "new_decoder_architecture": True, "num_kv_heads": 2},
    "bloom": {"n_head": 4, "n_layer": 2},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16, "expand": 2},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},
    "jamba": {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 8},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "zamba2": {
        "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "mamba_d_state": 16,
        "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 16, "chunk_size": 16, "use_mem_rope": True,
        "num_mem_blocks": 1, "num_key_value_heads": 4, "attention_head_dim": 32, "attention_hidden_size": 128,
        "use_shared_attention_adapter": False, "add_bias_linear": False,
    },
}  # fmt: skip


def architecture(name: str, seed: int = 0) -> Any:
    """The random model of an architecture, in fp32 and evaluation mode, frozen."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(seed)
    settings = {key: value for key, value in {**SHAPE, **ARCHITECTURES[name]}.items() if value is not ...}
    config = CONFIG_MAPPING[name](**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # the stock initialization is too small for differences to show
        parameter.data.normal_(0, 0.08) if parameter.dim() > 1 else None
    return model.requires_grad_(False).eval()
