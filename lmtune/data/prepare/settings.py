"""What a user decides about `prepare` besides its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Pairing = Literal["qa", "conversations"]


@dataclass(frozen=True)
class Settings:
    """The settings of `lmtune prepare`; each is an option of the command.

    Attributes:
        language: codes of ISO 639-1; rows in another language can be dropped.
        blocked: a file of words, one a line; rows with one of them can be dropped.
        min_characters, max_characters: of a row, all its texts together.
        similarity: from which share of common phrases on two rows are near duplicates.
        validation: the share of rows to hold out, or a file of rows that are held out already.
        pair: what messages of a chat or a forum become.
        assistant: who of them the model shall be; None: whoever answers.
        gap_minutes: silence after which a new conversation begins.
        columns: other names of keys, as `question=prompt`.
        seed: which rows are held out.
    """

    language: tuple[str, ...] = ()
    blocked: str | None = None
    min_characters: int | None = None
    max_characters: int | None = None
    similarity: float = 0.8
    validation: float | str = 0.0
    pair: Pairing = "qa"
    assistant: str | None = None
    gap_minutes: float = 60.0
    columns: tuple[str, ...] = ()
    seed: int = 0
