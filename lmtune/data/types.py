"""What the data become on their way.

    row of a file  →  Example(messages)  →  TokenizedExample(sequences)  →  ExampleStore

Everything behind the reader works on `Example` alone, everything behind the store on `ExampleStore` alone. Each type
keeps the file and line of its row, because every message about a row names them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol, get_args

if TYPE_CHECKING:  # `lmtune check` needs no NumPy until all rows are read
    import numpy as np
    import numpy.typing as npt

    from lmtune.data.sequences import SequenceTable

Role = Literal["system", "user", "assistant"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. An answer that is not `trained` is context of the answers after it."""

    role: Role
    content: str
    trained: bool = True


@dataclass(frozen=True)
class Example:
    """One row: `messages` that end with the assistant, or `text` if the row is plain text (then without messages)."""

    source: str  # the file's name, without the folders of this machine
    line: int  # counted from 1
    messages: tuple[Message, ...] = ()
    text: str | None = None

    @property
    def location(self) -> str:
        """`file:line`."""
        return f"{self.source}:{self.line}"

    @property
    def num_characters(self) -> int:
        """Characters of all contents."""
        return len(self.text) if self.text is not None else sum(len(message.content) for message in self.messages)


def content_hash(example: Example) -> int:
    """64 bits, equal for rows of equal content; two of 10 million different rows collide in one of 400,000 files."""
    return _hash64(["text", example.text] if example.text is not None else _parts(example.messages))


def prompt_hash(example: Example) -> int:
    """64 bits, equal for rows with the same messages before the last answer; of a text its `content_hash`."""
    return content_hash(example) if example.text is not None else _hash64(_parts(example.messages[:-1]))


def _parts(turns: Sequence[Message]) -> list[str]:
    return [part for turn in turns for part in (turn.role if turn.trained else f"{turn.role}, read", turn.content)]


def _hash64(parts: list[str]) -> int:
    # The reader refuses NUL in contents, so joined by NUL different rows stay different.
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """T tokens that attend to each other and to nothing else.

    Attributes:
        input_ids: int32 `[T]`.
        loss_mask: bool `[T]`, whether token t is a target; `loss_mask[0]` is False, because nothing predicts token 0.
    """

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.input_ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenSequence):
            return NotImplemented
        ids, mask = (self.input_ids.tolist(), self.loss_mask.tolist())
        return bool(ids == other.input_ids.tolist() and mask == other.loss_mask.tolist())

    @property
    def num_targets(self) -> int:
        """Tokens that count in the loss."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """One row as tokens; `location` is `file:line`, `values` what an objective has stored beside its tokens."""

    location: str
    sequences: tuple[TokenSequence, ...]
    values: Mapping[str, float] = field(default_factory=dict)


class ExampleStore(Protocol):
    """N tokenized rows, read one at a time.

    Attributes:
        sequences: the lengths of every row's sequences.
        signature: SHA-256, in hex, of the rows' tokens.
    """

    @property
    def sequences(self) -> SequenceTable:
        """Tokens and targets of each sequence of each row."""

    @property
    def signature(self) -> str:
        """Equal for equal tokens, whatever made them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> TokenizedExample: ...

    def location(self, index: int) -> str:
        """`file:line` of a row."""


class WithValues:
    """The rows of another store with numbers (`[N]` by name) beside their tokens: what an objective computes once."""

    def __init__(self, store: ExampleStore, **values: npt.NDArray[np.float32]) -> None:
        self._store, self._values = store, values
        self.sequences, self.signature = store.sequences, store.signature

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: int) -> TokenizedExample:
        row = self._store[index]
        own = {name: float(column[index]) for name, column in self._values.items()}
        return replace(row, values={**row.values, **own})

    def location(self, index: int) -> str:
        """`file:line` of a row."""
        return self._store.location(index)
