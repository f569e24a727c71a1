"""The work that every arm of a benchmark does: a model of random weights, an adapter, and rows of tokens.

Lengths follow a lognormal distribution as real instruction data do: many short rows, a long tail. Tokens are random,
since neither time nor exactness depends on what they say. With a data file, rows are the file's own, rendered by a
tokenizer trained on it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

# hidden, intermediate, layers, heads, key-value heads, vocabulary
SHAPES = {
    "1m": (64, 192, 2, 4, 2, 8000),  # to try things on
    "30m": (512, 1408, 8, 8, 4, 32000),
    "100m": (768, 2048, 12, 12, 4, 32000),
    "1b": (2048, 5504, 20, 16, 8, 64000),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Workload:
    """One benchmark's work.

    Attributes:
        shape: a key of `SHAPES`.
        quantization: none, nf4 or int8.
        label_fraction: trained tokens / tokens, at the end of each row.
        batch_size: rows of an optimizer step.
        rank: of the adapter, on all linear layers.
        max_length: rows are cut to so many tokens.
        shared_prefix: equal tokens at the beginning of every row.
        own_tokens: with a shared prefix, what follows it, in every row.
        fixed_length: tokens of every row, instead of lengths with a long tail.
        data: a file of rows in any of lmtune's formats, instead of random ones.
        seed: of weights and rows.
    """

    shape: str
    quantization: str = "none"
    label_fraction: float = 0.3
    batch_size: int = 16
    rank: int = 16
    max_length: int = 1024
    shared_prefix: int = 0
    own_tokens: int = 64
    fixed_length: int | None = None
    data: str | None = None
    seed: int = 0

    def rows(self, step: int) -> list[Any]:
        """The rows of an optimizer step: `documents` with `input_ids[t]` and `trained[t]`; the same for every arm."""
        if self.data is not None:
            some = np.random.default_rng([self.seed, step]).choice(len(self._file_rows), self.batch_size, replace=False)
            return [_as_random_rows_are(self._file_rows[int(index)]) for index in some]
        generator = np.random.default_rng([self.seed, step])
        vocabulary = SHAPES[self.shape][5]
        prefix = np.random.default_rng(self.seed).integers(5, vocabulary, self.shared_prefix)
        rows = []
        for index in range(self.batch_size):
            if self.shared_prefix:
                length = self.own_tokens
            elif self.fixed_length:
                length = self.fixed_length
            else:
                length = int(np.clip(generator.lognormal(4.8, 0.8), 16, self.max_length))
            ids = np.concatenate([prefix, generator.integers(5, vocabulary, length)])
            trained = np.zeros(len(ids), dtype=bool)
            trained[-max(4, int(self.label_fraction * length)) :] = True  # none in a shared prefix
            document = SimpleNamespace(input_ids=ids, loss_mask=trained)
            rows.append(SimpleNamespace(where=f"step {step} row {index}", sequences=[document]))
        return rows

    @cached_property
    def _file_rows(self) -> Any:
        """The rows of the data file."""
        from lmtune.config.schema import DataConfig
        from lmtune.data.rendering import Renderer
        from lmtune.data.store import tokenize

        assert self.data is not None
        config = DataConfig(train=self.data, max_length=self.max_length)
        return tokenize([self.data], Renderer(self.tokenizer(), "auto", None, ()), config)

    def tokenizer(self) -> Any:
        """A byte-level BPE tokenizer trained on the data file, or on lmtune's example file where there is none."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        source = Path(self.data) if self.data else Path(__file__).parents[1] / "examples" / "support.jsonl"
        texts = [" ".join(str(v) for v in json.loads(line).values()) for line in source.open() if line.strip()]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=min(8000, SHAPES[self.shape][5]), special_tokens=["<pad>", "</s>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        tokenizer.train_from_iterator(texts, trainer)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")

    @property
    def trained_share(self) -> float:
        """Trained tokens / tokens, of the rows as they are."""
        documents = [document for row in self.rows(1) for document in row.sequences]
        return sum(int(d.loss_mask.sum()) for d in documents) / sum(len(d.input_ids) for d in documents)

    def write_base(self, folder: Path) -> None:
        """Save the random base model once; every arm loads it."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[self.shape]
        torch.manual_seed(self.seed)
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=True, pad_token_id=0,
            max_position_embeddings=8192,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)


def _as_random_rows_are(row: Any) -> Any:
    """A row of a file with the types of the random ones."""
    documents = [SimpleNamespace(input_ids=d.input_ids.astype(np.int64), loss_mask=d.loss_mask) for d in row.sequences]
    return SimpleNamespace(location=row.location, sequences=documents)


def adapted(model: Any, rank: int, seed: int) -> Any:
    """`model` with an adapter whose B is small but not zero, the same in every arm."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(TARGETS))
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            spread = 0.02 if "lora_B" in name else rank**-0.5 / 4
            parameter.data = (torch.randn(parameter.shape, generator=generator) * spread).to(parameter.device)
    return peft_model
