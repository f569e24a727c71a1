"""Plain text for pretraining: the documents, the tokenizer trained on them, and blocks of their tokens.

    documents → byte-level BPE → one long stream of tokens → blocks of fixed length, without padding

A block is an example whose sequences are the documents in it, so documents do not attend to each other. Conversations
are written with the chat template; in a text, control tokens are just characters.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lmtune.config.pretrain import CorpusConfig
from lmtune.data.encodings import Guess
from lmtune.data.readers import detected, open_text
from lmtune.data.reading import ReadReport, read_examples
from lmtune.data.sequences import SequenceTable
from lmtune.data.sources import HUB, find_files, is_read
from lmtune.data.types import Example, TokenizedExample, TokenSequence
from lmtune.errors import DataError
from lmtune.io.console import warn
from lmtune.io.text import format_list

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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
_TEXTS = (".txt", ".txt.gz", ".txt.zst")
_CHUNK_DOCUMENTS = 2000  # encoded at a time, so that all cores work and memory stays small


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, and others to measure on; `read_as` is what was found out about files, by their names."""

    train: Sequence[Example]
    validation: Sequence[Example]
    read_as: Mapping[str, str] = field(default_factory=dict)


class Blocks:
    """N tokens cut into blocks of B: an `ExampleStore` whose examples are the blocks, every token a target.

    A document that an edge cuts goes on in the next block as a sequence of its own. A rest shorter than a block is left
    out, unless it is all there is.

    Attributes:
        num_tokens: N, of whole blocks.
        sequences: of the blocks; a single token predicts nothing and is left out.
    """

    def __init__(self, documents: Sequence[npt.NDArray[np.int32]], block_length: int) -> None:
        self._ids = np.concatenate(documents)
        length = min(block_length, len(self._ids))
        self.num_tokens = len(self._ids) // length * length
        begins = np.cumsum([0, *map(len, documents)])
        begins = np.union1d(begins[begins < self.num_tokens], np.arange(0, self.num_tokens, length))
        ends = np.append(begins[1:], self.num_tokens)
        kept = ends - begins > 1
        self._begins, self._ends = begins[kept], ends[kept]
        lengths = (self._ends - self._begins).astype(np.int32)
        first = np.searchsorted(self._begins, np.arange(0, self.num_tokens + length, length))
        self.sequences = SequenceTable(lengths, lengths - 1, first)
        self.signature = hashlib.sha256(self._ids.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.sequences.first) - 1

    def __getitem__(self, index: int) -> TokenizedExample:
        places = range(self.sequences.first[index], self.sequences.first[index + 1])
        parts = [self._ids[self._begins[place] : self._ends[place]] for place in places]
        return TokenizedExample(self.location(index), tuple(TokenSequence(ids, _all_but_first(ids)) for ids in parts))

    def location(self, index: int) -> str:
        """`block N`: its documents may be of several files."""
        return f"block {index + 1}"


def _all_but_first(ids: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    return np.arange(len(ids)) > 0


def read_corpus(data: CorpusConfig) -> Corpus:
    """Read the documents, shuffle them, and hold out some; DataError if there are too few, or they cannot be read."""
    texts, rows = _files_in(data.path)
    read_as: dict[str, str] = {}
    found = [*_read_texts(texts, data.split, read_as), *_read_rows(rows, read_as)]
    if not found:
        problem = "holds no text" if os.path.exists(data.path) else "not found"
        raise DataError(
            f"data.path: {data.path}: {problem}; expected .txt files, or files of rows; name yours: data.path=FOLDER"
        )
    Random(data.seed).shuffle(found)
    held_out = max(1, round(len(found) * data.validation_fraction))
    train = found[held_out:]
    known = {_content(document) for document in train}
    validation = [document for document in found[:held_out] if _content(document) not in known]
    if not train or not validation:
        raise DataError(
            f"data.path: {data.path} holds {len(found)} documents, of which none can be held out to measure on; "
            "give more text, or set data.split: paragraph, which makes a document of each paragraph"
        )
    return Corpus(train, validation, read_as)


def train_tokenizer(documents: Sequence[Example], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocabulary_size` tokens, with a chat template.

    Digits stand alone, so that numbers are read the same wherever they stand.
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
    texts = (text for document in documents for text in _content(document))
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=PAD,
        extra_special_tokens=[TURN_END, *ROLES], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def tokenize(documents: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> list[npt.NDArray[np.int32]]:
    """The token ids of each document, and the end-of-text token; texts first, conversations after."""
    backend, end = tokenizer.backend_tokenizer, int(tokenizer.eos_token_id)
    texts = [document.text for document in documents if document.text is not None]
    chats = [
        [{"role": message.role, "content": message.content} for message in document.messages]
        for document in documents if document.text is None
    ]  # fmt: skip
    ids: list[npt.NDArray[np.int32]] = []

    def encode(some: Sequence[str]) -> None:
        for start in range(0, len(some), _CHUNK_DOCUMENTS):
            encoded = backend.encode_batch(some[start : start + _CHUNK_DOCUMENTS], add_special_tokens=False)
            ids.extend(np.array([*encoding.ids, end], dtype=np.int32) for encoding in encoded)

    backend.encode_special_tokens = True  # "<|end|>" in a text is just these characters
    encode(texts)
    backend.encode_special_tokens = False
    if chats:
        encode(tokenizer.apply_chat_template(chats, tokenize=False))
    return ids


def _files_in(given: str) -> tuple[list[Path], list[str]]:
    """The files of text, and those of rows; of a folder also those in folders below."""
    path = Path(os.path.expanduser(given))
    if os.path.isdir(path):
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]
        texts = [file for file in files if file.name.lower().endswith(_TEXTS)]
        return texts, [str(file) for file in files if is_read(file.name)]
    is_text = os.path.isfile(path) and not is_read(path.name)
    is_there = os.path.isfile(path) or given.startswith(HUB) or re.search(r"\.xls[xm]:", given, re.IGNORECASE)
    return ([path], []) if is_text else ([], [given] if is_there else [])


def _read_texts(files: Sequence[Path], split: str, read_as: dict[str, str]) -> Iterator[Example]:
    """The documents in files of text, in whatever encoding can be told."""
    unreadable = []
    for path in files:
        said: list[str] = []
        try:
            with open_text(path, said) as file:
                text = file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            advice = detected(path).advice(path.name)
            unreadable.append(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8: {advice}")
            continue
        except (OSError, EOFError, zlib.error) as error:
            unreadable.append(f"{path}: cannot be read ({error})")
            continue
        if said:
            read_as[path.name] = ", ".join(said)
            _warn_of_guesses(path.name, said)
        for part in text.split("\n\n") if split == "paragraph" else [text]:
            if part.strip():
                yield Example(path.name, 1, text=part.strip())
    if unreadable:
        raise DataError(f"{len(unreadable)} files cannot be read\n{format_list(unreadable)}")


def _read_rows(files: Sequence[str], read_as: dict[str, str]) -> Iterator[Example]:
    """The rows of files of rows."""
    if files:
        report = ReadReport()
        for example in read_examples(find_files(files), report, "answer"):
            if example.weight not in (0, 1):
                reason = f"weight is {example.weight:g}; pretrain trains every document alike: remove the key"
                report.add_fault(example.location, reason)
            elif example.tools or any(turn.role == "tool" or turn.tool_calls for turn in example.messages):
                report.add_fault(example.location, "the template of pretrain has no tools; write the row without them")
            elif example.weight:
                yield example
        report.raise_for_faults("error", 1)
        read_as.update(report.read_as)
        for found in report.files:
            _warn_of_guesses(found.name, found.said)


def _warn_of_guesses(name: str, said: Sequence[str]) -> None:
    for one in said:
        if isinstance(one, Guess):
            warn(f"{name}: {one.warning}")


def _content(document: Example) -> tuple[str, ...]:
    """The texts of a document, without its control tokens."""
    return (document.text,) if document.text is not None else tuple(turn.content for turn in document.messages)
