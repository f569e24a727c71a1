"""The config of `lmtune pretrain`: a small language model and its tokenizer, from plain text.

config = load_config(PretrainConfig, "recipes/configs/pretrain_tiny.yaml")
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lmtune.config.schema import Count, Fraction, section


@section
class CorpusConfig:
    """What is read: plain text, and rows of text or messages."""

    path: Annotated[
        str, Field(min_length=1)
    ]  # a .txt file, a file of rows, hub:NAME, or a folder with such files at any depth
    split: Literal["file", "paragraph"] = "file"  # of .txt: a document is a whole file, or a paragraph
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.02  # of the documents
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # of which documents are held out


@section
class TokenizerConfig:
    """The byte-level BPE tokenizer, trained on the corpus."""

    vocabulary_size: Annotated[int, Field(ge=272, le=262_144)] = 2048  # 256 bytes and the special tokens are the least


@section
class ShapeConfig:
    """The shape of the model; names are those of a transformers config."""

    architecture: Literal["llama", "qwen3"] = "llama"
    hidden_size: Count = 256
    intermediate_size: Count = 512
    num_hidden_layers: Count = 4
    num_attention_heads: Count = 4
    num_key_value_heads: Count | None = None  # null: as many as attention heads
    max_position_embeddings: Annotated[int, Field(ge=8)] = 2048
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    tie_word_embeddings: bool = True  # the output head is the embedding


@section
class PretrainTrainConfig:
    """The optimization: AdamW over blocks of text, cosine with warm-up."""

    epochs: Annotated[float, Field(gt=0, le=1e6)] = 1
    max_steps: Count | None = None  # overrules `epochs`
    batch_size: Count = 32  # blocks in a step
    block_length: Annotated[int, Field(ge=8)] = 256  # tokens
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 2.0e-3
    warmup_ratio: Fraction = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


@section
class OutputConfig:
    """Where the model goes, and in which precision."""

    dir: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(min_length=1)] = "a small language model"  # the title of the model card
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


@section
class PretrainConfig:
    """Everything about one pretraining run."""

    data: CorpusConfig
    output: OutputConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ShapeConfig = ShapeConfig()
    train: PretrainTrainConfig = PretrainTrainConfig()

    def problems(self) -> list[str]:
        """What is wrong between settings that are each right alone."""
        found = []
        shape, heads = self.model, self.model.num_attention_heads
        if shape.hidden_size % (2 * heads):
            found.append(
                f"model.hidden_size: {shape.hidden_size} cannot be divided among {heads} attention heads of an even "
                f"size; should be a multiple of {2 * heads}"
            )
        if heads % (shape.num_key_value_heads or heads):
            found.append(
                f"model.num_key_value_heads: {shape.num_key_value_heads} does not divide the {heads} attention heads"
            )
        if self.train.block_length > shape.max_position_embeddings:
            found.append(
                f"train.block_length: {self.train.block_length} is more than model.max_position_embeddings "
                f"({shape.max_position_embeddings})"
            )
        return found
