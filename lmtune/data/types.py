"""A row of a data file, whatever format it was written in: a conversation, or a plain text.

Everything behind the reader works on `Example` alone, so a new format needs one function in `lmtune.data.formats` and
nothing else. An example knows the file and line that it came from, because every message about it names them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal["system", "user", "assistant"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. An answer that is not `learned` is only read, before the answers that follow it."""

    role: Role
    content: str
    learned: bool = True


@dataclass(frozen=True)
class Example:
    """One row: `messages` that end with the assistant, or `text` when the row is plain text (no messages then)."""

    source: str  # the file's name, without the folders of this machine
    line: int  # counted from 1
    messages: tuple[Message, ...] = ()
    text: str | None = None

    @property
    def where(self) -> str:
        """`file:line`."""
        return f"{self.source}:{self.line}"

    @property
    def num_characters(self) -> int:
        """Characters of all contents together."""
        return len(self.text) if self.text is not None else sum(len(message.content) for message in self.messages)


def content_hash(example: Example) -> int:
    """64 bits that equal rows share, wherever they stand; 10 million rows meet by chance once in 400,000 files."""
    return _hash64(_parts(example))


def prompt_hash(example: Example) -> int:
    """64 bits that rows with the same words before the last answer share."""
    return _hash64(_parts(example, last=-1))


def _parts(example: Example, last: int | None = None) -> list[str]:
    if example.text is not None:
        return ["text", example.text if last is None else ""]
    turns = example.messages[:last]
    return [part for turn in turns for part in (turn.role if turn.learned else f"{turn.role}, read", turn.content)]


def _hash64(parts: list[str]) -> int:
    # No content holds a NUL (the reader refuses it), so joining by it keeps different rows apart.
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "little")
