"""From plain text to the blocks of tokens that pretraining reads, and the tokenizer between them.

    documents → byte-level BPE → one long stream of tokens → blocks of fixed length, without padding

Each token knows its place in its document, so documents that share a block do not see each other. Conversations of the
built-in world are written with the chat template; a user's text is never read as control tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lmtune.demo.world import Document, world
from lmtune.errors import DataError
from lmtune.io.text import format_list
from lmtune.training.pretrain_config import CorpusConfig

END_OF_TEXT, PAD, TURN_END = "<|end_of_text|>", "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
# One token before a turn and one after it: short documents, and nothing that could merge with the words beside it.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{{- '<|system|>' }}
{%- elif message['role'] == 'user' %}
{{- '<|user|>' }}
{%- elif message['role'] == 'assistant' %}
{{- '<|assistant|>' }}
{%- else %}
{{- raise_exception('the role of a message is system, user or assistant, not ' + message['role']) }}
{%- endif %}
{{- message['content'] + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}
"""
_CHUNK_DOCUMENTS = 2000  # encoded at a time, so that all cores work and memory stays small


@dataclass(frozen=True)
class Corpus:
    """Documents to learn, and documents to measure on; none of these stands among those."""

    train: Sequence[Document]
    validation: Sequence[Document]


@dataclass(frozen=True)
class TokenStream:
    """Documents end to end. N tokens.

    Attributes:
        input_ids: `int32[N]`.
        position_ids: `int32[N]`, from 0 within each document.
    """

    input_ids: np.ndarray[Any, np.dtype[np.int32]]
    position_ids: np.ndarray[Any, np.dtype[np.int32]]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Blocks:
    """B blocks of T tokens.

    Attributes:
        input_ids: `int64[B, T]`.
        position_ids: `int64[B, T]`, from 0 at each document and each block.
        targets: `int64[B, T]`, the next token; -100 where a document or block ends.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor


def read_corpus(data: CorpusConfig) -> Corpus:
    """Read or write the documents, shuffle them, and hold out some.

    Raises:
        DataError: no text is found, a file is not UTF-8, or there are too few documents to hold one out.
    """
    documents: list[Document]
    if data.world_documents is not None:
        documents = list(world(data.world_documents, data.seed))
    else:
        documents = list(_read_texts(Path(str(data.path)), data.split))
    Random(data.seed).shuffle(documents)
    held_out = max(1, round(len(documents) * data.validation_fraction))
    train = documents[held_out:]
    known = set(train)
    validation = [document for document in documents[:held_out] if document not in known]
    if not train or not validation:
        raise DataError(
            f"data.path: {data.path} holds {len(documents)} documents, of which none can be held out to measure on; "
            "give more text, or set data.split: paragraph, which makes a document of each paragraph"
        )
    return Corpus(train, validation)


def train_tokenizer(documents: Sequence[Document], vocabulary_size: int) -> Any:
    """A byte-level BPE tokenizer with a chat template, learned from `documents`.

    Digits stand alone, so that numbers are read the same wherever they stand.

    Returns:
        A transformers tokenizer of at most `vocabulary_size` tokens.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=[END_OF_TEXT, PAD, TURN_END, *ROLES], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    texts = (text for document in documents for text in _texts(document))
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=PAD,
        extra_special_tokens=[TURN_END, *ROLES], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def tokenize(documents: Sequence[Document], tokenizer: Any) -> TokenStream:
    """All documents as one stream; each ends with the end-of-text token."""
    end = int(tokenizer.eos_token_id)
    ids: list[np.ndarray[Any, np.dtype[np.int32]]] = []
    for start in range(0, len(documents), _CHUNK_DOCUMENTS):
        for encoded in _encode(documents[start : start + _CHUNK_DOCUMENTS], tokenizer):
            ids.append(np.array([*encoded, end], dtype=np.int32))
    positions = [np.arange(len(document), dtype=np.int32) for document in ids]
    return TokenStream(np.concatenate(ids), np.concatenate(positions))


def num_blocks(stream: TokenStream, block_length: int) -> int:
    """How many blocks `stream` is cut into; a shorter rest counts as one only where it is all there is."""
    return max(1, len(stream) // block_length)


def take_blocks(stream: TokenStream, block_length: int, indices: Sequence[int]) -> Blocks:
    """The blocks of these numbers. A document cut by a block's edge goes on in the next block from position 0."""
    block_length = min(block_length, len(stream))
    rows = np.asarray(indices)[:, None] * block_length + np.arange(block_length)[None]  # [B, T]
    ids, positions = stream.input_ids[rows].astype(np.int64), stream.position_ids[rows].astype(np.int64)
    # A block's first document may have begun before it: count from the block's start up to the first new document.
    begun = np.maximum.accumulate(positions == 0, axis=1)
    positions = np.where(begun, positions, np.arange(block_length)[None])
    targets = np.full_like(ids, -100)
    targets[:, :-1] = np.where(positions[:, 1:] == 0, -100, ids[:, 1:])
    return Blocks(torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(targets))


def _read_texts(path: Path, split: str) -> Iterator[str]:
    files = [path] if os.path.isfile(path) else sorted(path.rglob("*.txt")) if os.path.isdir(path) else []
    if not files:
        problem = "holds no .txt file" if os.path.isdir(path) else "not found"
        raise DataError(f"data.path: {path} {problem}")
    unreadable, found = [], False
    for file in files:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            unreadable.append(f"{file}: not UTF-8 (byte {error.start}); save it as UTF-8")
            continue
        for part in text.split("\n\n") if split == "paragraph" else [text]:
            if part.strip():
                found = True
                yield part.strip()
    if unreadable:
        raise DataError(f"{len(unreadable)} files cannot be read\n{format_list(unreadable)}")
    if not found:
        raise DataError(f"data.path: the text files in {path} are empty")


def _texts(document: Document) -> Iterator[str]:
    """The texts that the tokenizer learns from: a document's own words."""
    if isinstance(document, str):
        yield document
    else:
        yield from (turn.content for turn in document)


def _encode(documents: Sequence[Document], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of each document: texts without control tokens first, conversations through the template after."""
    backend = tokenizer.backend_tokenizer
    texts = [document for document in documents if isinstance(document, str)]
    chats = [
        [{"role": message.role, "content": message.content} for message in document]
        for document in documents if not isinstance(document, str)
    ]  # fmt: skip
    backend.encode_special_tokens = True  # "<|end|>" in a text is just these characters
    yield from (encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False))
    backend.encode_special_tokens = False
    if chats:
        rendered = tokenizer.apply_chat_template(chats, tokenize=False)
        yield from (encoding.ids for encoding in backend.encode_batch(rendered, add_special_tokens=False))
