"""Rows as the model sees them: token by token, with the targets of the loss green, or in [brackets] without color.

Blanks, line ends and control characters are made visible. A character of several tokens is shown as itself, with their
number: 歷{3}.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from lmtune.data.lengths import WHY_DROPPED, Fitted
from lmtune.data.report import label_name
from lmtune.data.types import Example, TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TARGET = ("green underline", "bright_green underline")
_OTHER = ("dim", "")
_VISIBLE = {" ": "·", "\n": "⏎\n", "\t": "⇥"}
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_MAX_PARTS = 8  # tokens; no character has more, with a blank before it


def show_tokens(tokenizer: PreTrainedTokenizerBase, sequence: TokenSequence, color: bool) -> Text:
    """The tokens of a sequence in order, its targets marked."""
    shown = Text()
    for index, (text, count, is_target) in enumerate(pieces_of(tokenizer, sequence)):
        number = f"{{{count}}}" if count > 1 else ""
        if color:  # neighbours in different shades, so that one sees where a token ends
            shown.append(text, style=(_TARGET if is_target else _OTHER)[index % 2]).append(number, style="dim")
        else:
            bare, newline = (text[:-1], "\n") if text.endswith("\n") else (text, "")
            shown.append((f"[{bare}]{number}" if is_target else f"{bare}{number} ") + newline)
    return shown


def parts_of(
    example: Example, fitted: Fitted, whole: Sequence[TokenSequence]
) -> list[tuple[str, str, TokenSequence]]:  # fmt: skip
    """The sequences of a row, those of `whole` if it is dropped, each with its name and what is to say of it.

    ("rows.jsonl:3 (chosen)", "42 tokens, 7 trained", …)
    """
    sequences = [sequence for row in fitted.rows for sequence in row] or whole
    noted = "" if example.label is None else f"; label: {label_name(example.label)}"
    noted += "" if example.weight == 1 else f"; weight: {example.weight:g}"
    kind = "piece" if len(fitted.rows) > 1 else "sequence"
    names = [f" ({kind} {number + 1})" for number in range(len(sequences))] if len(sequences) > 1 else [""]
    if example.kind == "pair":
        names = [" (chosen)", " (rejected)"]
    return [
        (example.location + name, f"{len(one):,} tokens, {one.num_targets:,} trained{noted}", one)
        for name, one in zip(names, sequences, strict=True)
    ]


def why_dropped(example: Example, fitted: Fitted, max_length: int) -> str | None:
    """Why a row is left out, if it is."""
    if not example.weight:
        return "its weight is 0"
    return None if fitted.dropped is None else f"{WHY_DROPPED[fitted.dropped]} ({max_length:,})"


def sequence_tree(tokenizer: PreTrainedTokenizerBase, sequence: TokenSequence) -> dict[str, Any]:
    """A sequence as `lmtune preview --json` gives it: text, input_ids `[T]`, tokens `[T]`, trained `[T]`."""
    ids = sequence.input_ids.tolist()
    return {
        "text": tokenizer.decode(ids), "input_ids": ids, "tokens": [token_text(tokenizer, token) for token in ids],
        "trained": sequence.loss_mask.tolist(),
    }  # fmt: skip


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """One token, with white space and what has no glyph made visible."""
    piece, text = str(tokenizer.convert_ids_to_tokens(token)), _decoded(tokenizer, [token])
    if "\N{LOWER ONE EIGHTH BLOCK}" in piece:  # SentencePiece's blank, which decoding alone drops
        text = piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
    elif _INCOMPLETE in text:
        return _bytes(piece)
    return _visible(text)


def pieces_of(tokenizer: PreTrainedTokenizerBase, sequence: TokenSequence) -> Iterator[tuple[str, int, bool]]:
    """(text, number of tokens, whether targets) of each token; those that share a character come together."""
    ids, mask = sequence.input_ids.tolist(), sequence.loss_mask.tolist()
    start = 0
    while start < len(ids):
        count, text = 1, token_text(tokenizer, ids[start])
        if _INCOMPLETE in _decoded(tokenizer, ids[start : start + 1]):
            for end in range(start + 2, min(start + _MAX_PARTS, len(ids)) + 1):
                if mask[end - 1] != mask[start]:
                    break
                if _INCOMPLETE not in (together := _decoded(tokenizer, ids[start:end])):
                    text, count = _visible(together), end - start
                    break
        yield text, count, mask[start]
        start += count


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _visible(text: str) -> str:
    return "".join(_VISIBLE.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def _bytes(piece: str) -> str:
    """A token that is a part of a character; the letters with which byte-level tokenizers write bytes, as bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    if not all(letter in byte_of for letter in piece):
        return _visible(piece)
    raw = bytes(byte_of[letter] for letter in piece)
    return _visible(raw.decode("utf-8", "backslashreplace"))
