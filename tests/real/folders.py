"""Model folders out of what `tests.real.fetch` has fetched: a real tokenizer, a real template, a tiny random model."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from lmtune.models.gguf import gguf_folder

REAL = Path(os.environ.get("LMTUNE_REAL", ".venv/real")).resolve()
# What templates write and take for tokens of their own; the nearest real tokenizer may not have them yet.
_CONTROL = re.compile(r"<\|[\w ]+\|?>|<\w+\|>|<｜[^｜]+｜>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>|</?think>")


def template_files() -> list[Path]:
    """The collection of templates, less those that its authors have changed for training."""
    return sorted(path for path in REAL.glob("templates/*.jinja") if not path.stem.endswith("_training"))


def template_of(name: str) -> str:
    return (REAL / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_of(name: str, template: str | None = None) -> Any:
    """A real tokenizer with its own template, or with `template` and the control tokens that this one writes."""
    tokenizer = AutoTokenizer.from_pretrained(REAL / name)
    if template is not None:
        known = tokenizer.get_vocab()
        new = [token for token in dict.fromkeys(_CONTROL.findall(template)) if token not in known]
        tokenizer.add_tokens([token for token in new if "think>" in token])
        tokenizer.add_special_tokens({"additional_special_tokens": [token for token in new if "think>" not in token]})
        tokenizer.chat_template = template
    return tokenizer


def smollm2() -> Path:
    """The model of 135 million weights as a plain model folder, which lmtune makes of its GGUF file."""
    return gguf_folder(str(REAL / "smollm2_gguf/model.gguf"), with_weights=True)


def save_base(folder: Path, tokenizer: Any) -> None:
    """A tiny random model over the tokenizer's whole vocabulary."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():  # the stock initialization is too small to be trained over in a few steps
        parameter.data.normal_(0, 0.08) if parameter.dim() > 1 else None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
