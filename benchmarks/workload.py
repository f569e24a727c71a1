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
from typing import Any, NamedTuple

import numpy as np


class Shape(NamedTuple):
    """The sizes of a Llama-like model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_dim: int
    tied: bool = True

    @property
    def linear(self) -> list[tuple[int, int]]:
        """Outputs and inputs of each linear layer of a decoder layer."""
        attention, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            (attention, self.hidden), (kv, self.hidden), (kv, self.hidden), (self.hidden, attention),
            (self.intermediate, self.hidden), (self.intermediate, self.hidden), (self.hidden, self.intermediate),
        ]  # fmt: skip


SHAPES = {
    "1m": Shape(64, 192, 2, 4, 2, 8000, 16),  # to try things on
    "30m": Shape(512, 1408, 8, 8, 4, 32000, 64),
    "100m": Shape(768, 2048, 12, 12, 4, 32000, 64),
    "0.6b": Shape(1024, 3072, 28, 16, 8, 151936, 128),  # Qwen3-0.6B
    "1b": Shape(2048, 5504, 20, 16, 8, 64000, 128),
    "8b": Shape(4096, 14336, 32, 32, 8, 128256, 128, tied=False),  # Llama-3.1-8B
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
        model: `tiny` or a model folder with its tokenizer, instead of random weights of `shape`.
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
    model: str | None = None
    seed: int = 0

    def rows(self, step: int) -> list[Any]:
        """The rows of an optimizer step: `documents` with `input_ids[t]` and `trained[t]`; the same for every arm."""
        if self.data is not None:
            some = np.random.default_rng([self.seed, step]).choice(len(self._file_rows), self.batch_size, replace=False)
            return [_as_random_rows_are(self._file_rows[int(index)]) for index in some]
        generator = np.random.default_rng([self.seed, step])
        vocabulary = self.dimensions.vocabulary
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
            trained[0] = False  # which nothing predicts
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
        """The model's; else a byte-level BPE tokenizer trained on the data file, or on lmtune's example file."""
        if self.model is not None:
            from lmtune.config.schema import ModelConfig
            from lmtune.models.base import load_tokenizer

            return load_tokenizer(ModelConfig(name=self.model))
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        source = Path(self.data) if self.data else Path(__file__).parents[1] / "examples" / "support.jsonl"
        texts = [" ".join(str(v) for v in json.loads(line).values()) for line in source.open() if line.strip()]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=min(8000, SHAPES[self.shape].vocabulary), special_tokens=["<pad>", "</s>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        tokenizer.train_from_iterator(texts, trainer)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")

    @cached_property
    def dimensions(self) -> Shape:
        """Of the model, or of `shape`."""
        if self.model is None:
            return SHAPES[self.shape]
        from transformers import AutoConfig

        from lmtune.models.base import resolve_name

        config = AutoConfig.from_pretrained(resolve_name(self.model)).get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return Shape(
            config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads,
            config.num_key_value_heads, config.vocab_size, head_dim, config.tie_word_embeddings,
        )  # fmt: skip

    @property
    def trained_share(self) -> float:
        """Trained tokens / tokens, of the rows as they are."""
        documents = [document for row in self.rows(1) for document in row.sequences]
        return sum(int(d.loss_mask.sum()) for d in documents) / sum(len(d.input_ids) for d in documents)

    def write_base(self, folder: Path) -> None:
        """Save the random base model once, unless there is a model; every arm loads it."""
        if self.model is not None:
            return
        import torch

        self.random_base(torch.device("cpu"), torch.float32).save_pretrained(folder)

    def random_base(self, device: Any, dtype: Any) -> Any:
        """The random model, made on its device: to write and read a large one takes minutes."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        shape, before = self.dimensions, torch.get_default_dtype()
        config = LlamaConfig(
            hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=shape.vocabulary,
            head_dim=shape.head_dim, tie_word_embeddings=shape.tied, pad_token_id=0, max_position_embeddings=8192,
        )  # fmt: skip
        torch.manual_seed(self.seed)
        torch.set_default_dtype(dtype)
        try:
            with device:
                return LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)


def _as_random_rows_are(row: Any) -> Any:
    """A row of a file with the types of the random ones."""
    documents = [SimpleNamespace(input_ids=d.input_ids.astype(np.int64), loss_mask=d.loss_mask) for d in row.sequences]
    return SimpleNamespace(location=row.location, sequences=documents)


def quantized(model: Any, kind: str, dtype: Any) -> Any:
    """`model` with every linear layer but the head in nf4 or int8, as transformers would load it."""
    import bitsandbytes as bnb
    import torch

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not torch.nn.Linear or layer is model.get_output_embeddings():
                continue
            sizes, weight = (layer.in_features, layer.out_features, False), layer.weight.data
            if kind == "nf4":
                made = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4")
                held = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
            else:
                made = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
                held = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
            made.weight = held.to(weight.device)
            setattr(parent, name, made)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "nf4", kind == "int8"  # which PEFT asks for
    return model


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
