"""Rows longer than `data.max_length`: dropped, cut at their beginning, split into pieces, or refused.

    fit(example, sequences, config).rows      # what is stored of the example: nothing, one row, or one for each piece

The pieces of a plain text share one token: the last of a piece begins the next, where it is read and not trained. So
every token is trained once, as if the text had never been cut but for what a piece cannot look back at.
"""

from __future__ import annotations

from dataclasses import dataclass

from lmtune.config.schema import DataConfig
from lmtune.data.types import Example, TokenSequence
from lmtune.errors import DataError

Row = tuple[TokenSequence, ...]
WHY_DROPPED = {
    "too_long": "longer than data.max_length",
    "answer_too_long": "the answer alone is longer than data.max_length",
    "not_split": "longer than data.max_length, and only plain text is split",
}


@dataclass(frozen=True)
class Fitted:
    """What is stored of an example.

    Attributes:
        rows: the sequences of each row: one row, or one for each piece; none if the example is dropped.
        dropped: why it is, a key of `WHY_DROPPED`.
        truncated: whether its beginning is cut off.
    """

    rows: tuple[Row, ...] = ()
    dropped: str | None = None
    truncated: bool = False


def fit(example: Example, sequences: Row, config: DataConfig) -> Fitted:
    """An example's sequences within `max_length`, as `config.too_long` says.

    Raises:
        DataError: the row is too long and `too_long` is `error`.
    """
    longest, limit = max(map(len, sequences)), config.max_length
    is_text = example.text is not None and example.kind == "answer"
    if longest <= limit:
        return Fitted((sequences,))
    if config.too_long == "error":
        raise DataError(
            f"{example.location}: {longest:,} tokens, but data.max_length is {limit:,}; shorten the row, "
            f"raise max_length, or set data.too_long: drop{', split' * is_text} or truncate"
        )
    if config.too_long == "drop":
        return Fitted(dropped="too_long")
    if config.too_long == "split":
        return Fitted(pieces(sequences[0], limit)) if is_text else Fitted(dropped="not_split")
    if example.kind == "labelled":
        (whole,) = sequences
        return Fitted(((TokenSequence(whole.input_ids[-limit:], whole.loss_mask[-limit:]),),), truncated=True)
    # the two answers of a pair lose equally many tokens, so that they keep the same prompt
    lengths = [len(one) - (longest - limit) if example.rejected else limit for one in sequences]
    cut = [truncated(*pair, is_text) for pair in zip(sequences, lengths, strict=True)]
    kept = tuple(sequence for sequence in cut if sequence is not None)
    if not kept or (example.rejected and len(kept) < len(cut)):
        return Fitted(dropped="answer_too_long")
    return Fitted((kept,), truncated=True)


def truncated(sequence: TokenSequence, max_length: int, is_text: bool) -> TokenSequence | None:
    """The last `max_length` tokens of a sequence, or None if they hold no target.

    The rest of an answer that lost its beginning or its prompt is not a target: it follows from nothing. A plain
    text may begin anywhere.
    """
    start = len(sequence) - max_length
    if start <= 0:
        return sequence
    loss_mask = sequence.loss_mask[start:].copy()
    lost = 1 if is_text else len(loss_mask) if loss_mask.all() else int(loss_mask.argmin())
    loss_mask[:lost] = False
    return TokenSequence(sequence.input_ids[start:], loss_mask) if loss_mask.any() else None


def pieces(text: TokenSequence, max_length: int) -> tuple[Row, ...]:
    """A text in rows of at most `max_length` tokens, in which each token but the first is a target once."""
    found = []
    for start in range(0, len(text) - 1, max_length - 1):
        loss_mask = text.loss_mask[start : start + max_length].copy()
        loss_mask[0] = False
        found.append((TokenSequence(text.input_ids[start : start + max_length], loss_mask),))
    return tuple(found)
