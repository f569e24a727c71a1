"""Tiny random models and rows for tests: built from a config, never downloaded, the same at each call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmtune.batching.packing import MicroBatch, Reads, pack
from lmtune.data.sequences import SequenceTable
from lmtune.data.types import TokenizedExample, TokenSequence
from lmtune.forward.packed import PackedForward
from lmtune.models.head import Head

VOCABULARY = 128
SAVED_VOCABULARY = 448  # at least as many as `tests.tokenizers` makes, and a multiple of 64
KINDS = ("llama", "qwen3", "mistral", "gpt2")
# Mixtures of experts: a dense layer and one of fused experts; a shared expert; experts stored transposed, with biases.
EXPERT_KINDS = ("qwen3_moe", "qwen2_moe", "gpt_oss")
_EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0]},
    "qwen2_moe": {
        "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128, "num_experts": 4,
        "num_experts_per_tok": 2, "num_hidden_layers": 1,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1},
}  # fmt: skip


def tiny_model(kind: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random model of two layers in fp32, evaluation mode, frozen."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        GptOssConfig,
        GptOssForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )  # fmt: skip

    common = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "head_dim": 16, "max_position_embeddings": 256,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(seed)
    if kind == "gpt2":
        shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": VOCABULARY}
        model = GPT2LMHeadModel(GPT2Config(**{**shape, "bos_token_id": 1, "eos_token_id": 2, **changes}))
    else:
        config_class, model_class = {
            "llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM),
            "mistral": (MistralConfig, MistralForCausalLM), "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
            "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM), "gpt_oss": (GptOssConfig, GptOssForCausalLM),
        }[kind]  # fmt: skip
        model = model_class(config_class(**{**common, **_EXPERTS.get(kind, {}), **changes}))
    for parameter in model.parameters():  # the stock initialization is too small for differences to show
        parameter.data.normal_(0, 0.08) if parameter.dim() > 1 else None
    return model.requires_grad_(False).eval()


def tiny_classifier(head: Head, kind: str = "llama", **changes: Any) -> Any:
    """A classifier over the body of `tiny_model`, its head in fp32 and seeded."""
    from transformers import AutoModelForSequenceClassification

    from lmtune.models.head import prepare_head

    base = tiny_model(kind, **changes)
    head.describe(base.config)
    model = AutoModelForSequenceClassification.from_config(base.config)
    model.base_model.load_state_dict(base.base_model.state_dict())
    prepare_head(model, head, None)
    model.score.weight.data *= 20  # so that differences show
    return model.requires_grad_(False).eval()


@dataclass
class Rows:
    """In-memory training rows, an `ExampleStore`."""

    rows: list[TokenizedExample]
    signature: str = "x"
    sequences: SequenceTable = field(init=False)

    def __post_init__(self) -> None:
        sequences = [sequence for row in self.rows for sequence in row.sequences]
        self.sequences = SequenceTable(
            np.array([len(sequence.input_ids) for sequence in sequences], dtype=np.int32),
            np.array([sequence.loss_mask.sum() for sequence in sequences], dtype=np.int32),
            np.cumsum([0, *(len(row.sequences) for row in self.rows)]),
            np.array([row.weight for row in self.rows]) if any(row.weight != 1 for row in self.rows) else None,
        )

    @property
    def num_targets(self) -> int:
        return int(self.sequences.num_targets.sum())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TokenizedExample:
        return self.rows[index]

    def location(self, index: int) -> str:
        return self.rows[index].location


def token_sequence(ids: Sequence[int] | np.ndarray, mask: Sequence[int] | np.ndarray) -> TokenSequence:
    """Token ids, and whether each is a target."""
    return TokenSequence(np.array(ids, dtype=np.int32), np.array(mask, dtype=bool))


def pack_rows(
    rows: Sequence[TokenizedExample], share_prefixes: bool = False, reads: Reads = "targets"
) -> MicroBatch:  # fmt: skip
    """All sequences of `rows`, each row an example, as one micro-batch."""
    sequences = [sequence for row in rows for sequence in row.sequences]
    example_of = [index for index, row in enumerate(rows) for _ in row.sequences]
    weights = [row.weight for row in rows for _ in row.sequences]
    return pack(sequences, example_of, len(rows), share_prefixes, weights=weights, reads=reads).to(
        torch.get_default_device()
    )


def losses_of(forward: PackedForward, batch: MicroBatch) -> torch.Tensor:
    """`[N]`, of each target."""
    with forward.context():
        return -forward(batch).logprobs


def random_rows(count: int, seed: int = 0, longest: int = 40) -> Rows:
    """Rows of 4 to `longest` random tokens, about the last third of each trained; every fifth has two documents."""
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        documents = []
        for _ in range(2 if index % 5 == 4 else 1):
            length = int(generator.integers(4, longest))
            trained = np.zeros(length, dtype=bool)
            trained[-max(1, length // 3) :] = True
            ids = generator.integers(3, VOCABULARY, length).astype(np.int32)
            documents.append(TokenSequence(ids, trained))
        rows.append(TokenizedExample(f"rows.jsonl:{index + 1}", tuple(documents)))
    return Rows(rows)


def weighted(rows: Rows) -> Rows:
    """The same rows with weights from 0.25 on."""
    return Rows([replace(row, weight=0.25 + 0.5 * index) for index, row in enumerate(rows.rows)])


def rows_behind_a_prefix() -> Rows:
    """Six rows, four of which begin alike for longer than a window of eight."""
    rows = random_rows(6).rows
    prefix = rows[0].sequences[0].input_ids[:1].repeat(18)
    for index in range(2, 6):
        sequences = [
            token_sequence(np.append(prefix, s.input_ids), np.append(np.zeros(18, dtype=bool), s.loss_mask))
            for s in rows[index].sequences
        ]
        rows[index] = replace(rows[index], sequences=tuple(sequences))
    return Rows(rows)


def adapted(model: Any, seed: int = 1, **settings: Any) -> Any:
    """`model` with an adapter whose B is not zero, so that every gradient is."""
    from lmtune.config.schema import LoraConfig
    from lmtune.models.tuning.base import trainable
    from lmtune.models.tuning.lora import attach_adapter

    peft_model = attach_adapter(model, LoraConfig(**{"rank": 4, "alpha": 8, **settings}), seed, "tiny-random")
    torch.manual_seed(seed)
    for name, parameter in trainable(peft_model).items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    return peft_model


def save_tiny(
    folder: Path, kind: str = "llama", chat_template: str | None = None, dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:  # fmt: skip
    """A model folder as from the Hub: a random model of `kind`, stored in `dtype`, with a tokenizer of its own."""
    from tests.tokenizers import make_tokenizer

    tokenizer = make_tokenizer(chat_template)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = tiny_model(kind, **{"vocab_size": SAVED_VOCABULARY, **ids, "pad_token_id": None, **changes})
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
