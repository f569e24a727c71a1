"""What the data become on their way.

    row of a file  →  Example(messages, …)  →  TokenizedExample(sequences)  →  ExampleStore

Everything behind the reader works on `Example` alone, everything behind the store on `ExampleStore` alone. Each type
keeps the file and line of its row, because every message about a row names them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol

from lmtune.config.schema import RowKind as RowKind  # which of them a run needs, its `objective` section says

if TYPE_CHECKING:  # `lmtune check` needs no NumPy until all rows are read
    import numpy as np
    import numpy.typing as npt

    from lmtune.data.sequences import SequenceTable

Role = Literal["system", "user", "assistant", "tool"]
# What is done with turns that a template does not take, or that are worth knowing of.
OUTCOMES = {
    "developer_as_system": "with a developer turn, read as system",
    "joined": "with turns of one role in a row, joined with a blank line",
    "ordered_results": "with results put in the order of their calls",
    "later_system": "with a system turn after the first turn, kept where it is",
    "cut_beginning": "cut to begin with the first turn of the user",
    "cut_end": "cut after the last answer that is trained",
    "not_trained": "with answers that are marked as not trained (context only)",
    "reasoning": "with reasoning",
    "tools": "with tools that the assistant may call",
    "tool_calls": "with tool calls",
    "unlisted_tools": "with a call of a tool that is not in tools",
}
Label = bool | int | float | str | tuple[str, ...]


@dataclass(frozen=True)
class ToolCall:
    """A function that the assistant calls.

    Attributes:
        name: of the function.
        arguments: a JSON object, as text.
        id: by which the result names its call.
    """

    name: str
    arguments: str
    id: str


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. An answer that is not `trained` is context of the answers after it.

    Attributes:
        role: who speaks; `tool` gives the result of a call.
        content: of an answer that reasons first, `<think>…</think>` and the answer.
        trained: whether an answer is trained.
        tool_calls: what the assistant calls, after its content.
        tool_call_id, name: of a result, the call that it answers, and the function.
    """

    role: Role
    content: str
    trained: bool = True
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Example:
    """One row: `messages`, or `text` if the row is plain text (then without messages).

    Attributes:
        source: the name of the file, sheet or split, without the folders of this machine.
        line: the row's number there, counted from 1.
        messages: a conversation that ends with the assistant; only a labelled one may end with the user.
        rejected: of a pair the same conversation with the worse answer; `messages` end in the better one.
        label: of a judged row whether its answer is good, of a labelled one what the whole is.
        weight: how much the row counts in the loss.
        kind: what the row can be used for.
        mark: what stands between source and number in the place of a row.
        tools: that the assistant may call, each as JSON text in OpenAI's form.
        outcomes: what was done with its turns, keys of `OUTCOMES`.
        origin: of a copy that `lmtune augment` made, the `prompt_hash` of its row.
    """

    source: str
    line: int
    messages: tuple[Message, ...] = ()
    text: str | None = None
    rejected: tuple[Message, ...] = ()
    label: Label | None = None
    weight: float = 1.0
    kind: RowKind = "answer"
    mark: str = ":"
    tools: tuple[str, ...] = ()
    outcomes: tuple[str, ...] = ()
    origin: int | None = None

    @property
    def location(self) -> str:
        """`file:line`, `file.parquet:row N`, `book.xlsx:Sheet1!AN`."""
        return f"{self.source}{self.mark}{self.line}"

    @property
    def num_characters(self) -> int:
        """Characters of all contents."""
        return sum(map(len, self.contents))

    @property
    def contents(self) -> list[str]:
        """Every text of the row, calls and tools included; of a pair the prompt once."""
        if self.text is not None:
            return [self.text]
        turns = (*self.messages, *self.rejected[-1:])
        calls = [part for turn in turns for call in turn.tool_calls for part in (call.name, call.arguments)]
        return [*(turn.content for turn in turns), *calls, *self.tools]


def content_hash(example: Example) -> int:
    """64 bits, equal for rows of equal content; two of 10 million different rows collide in one of 400,000 files."""
    parts = _content(example)
    if example.rejected:
        parts += ["rejected", *_parts(example.rejected[-1:])]
    if example.label is not None:
        parts += ["label", json.dumps(example.label)]
    return hash64(parts)


def prompt_hash(example: Example) -> int:
    """64 bits, equal for rows with the same messages before the last answer, or with the same text."""
    if example.text is not None or example.kind == "labelled":
        return hash64(_content(example))
    return hash64([*_tools(example), *_parts(example.messages[:-1])])


def piece_hash(content: int, number: int) -> int:
    """64 bits: of the piece of this number of a row with this `content_hash`."""
    return hash64(["piece", str(content), str(number)])


def _content(example: Example) -> list[str]:
    return ["text", example.text] if example.text is not None else [*_tools(example), *_parts(example.messages)]


def _tools(example: Example) -> list[str]:
    return [part for tool in example.tools for part in ("may call", tool)]


def _parts(turns: Sequence[Message]) -> list[str]:
    """What a conversation says; ids of calls, which are arbitrary, left out."""
    parts: list[str] = []
    for turn in turns:
        parts += [turn.role if turn.trained else f"{turn.role}, read", turn.content]
        parts += [part for call in turn.tool_calls for part in ("calls", call.name, call.arguments)]
    return parts


def hash64(parts: list[str]) -> int:
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
    """One row as tokens.

    Attributes:
        location: `file:line`.
        sequences: of a pair the better and the worse answer, each behind the prompt; of a labelled row one without
            targets; of others as many as the template needs.
        values: what an objective has stored beside the tokens: numbers, or fp32 `[K]`.
        label, weight: as in `Example`.
    """

    location: str
    sequences: tuple[TokenSequence, ...]
    values: Mapping[str, float | npt.NDArray[np.float32]] = field(default_factory=dict)
    label: Label | None = None
    weight: float = 1.0


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
    """The rows of another store with numbers beside their tokens, by name `[N]` or `[N, K]`: computed once.

    Attributes:
        columns: the numbers.
    """

    def __init__(self, store: ExampleStore, **values: npt.NDArray[np.float32]) -> None:
        self._store, self.columns = store, values
        self.sequences, self.signature = store.sequences, store.signature

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: int) -> TokenizedExample:
        row = self._store[index]
        own = {
            name: float(column[index]) if column.ndim == 1 else column[index] for name, column in self.columns.items()
        }
        return replace(row, values={**row.values, **own})

    def location(self, index: int) -> str:
        """`file:line` of a row."""
        return self._store.location(index)
