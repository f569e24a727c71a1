"""Rows as the model will see them: token by token, with the learned ones marked.

On a terminal learned tokens are green and underlined; without colour they stand in [brackets] and a blank follows each
other, so a page piped into a file says the same. Blanks, line ends and control characters are made visible. A
character of several tokens is shown as itself, with their number: 歷{3}.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.text import Text

_LEARNED = ("green underline", "bright_green underline")
_OTHER = ("dim", "")
_VISIBLE = {" ": "·", "\n": "⏎\n", "\t": "⇥"}
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_MAX_PARTS = 8  # tokens; no character has more, with a blank before it


def show_tokens(tokenizer: Any, input_ids: Sequence[int], trained: Sequence[bool], colour: bool) -> Text:
    """The tokens `input_ids[T]` in order, those that are `trained[T]` marked as learned."""
    shown = Text()
    for index, (text, count, learned) in enumerate(_pieces(tokenizer, input_ids, trained)):
        number = f"{{{count}}}" if count > 1 else ""
        if colour:  # neighbours in different shades, so that one sees where a token ends
            shown.append(text, style=(_LEARNED if learned else _OTHER)[index % 2]).append(number, style="dim")
        else:
            bare, newline = (text[:-1], "\n") if text.endswith("\n") else (text, "")
            shown.append((f"[{bare}]{number}" if learned else f"{bare}{number} ") + newline)
    return shown


def document_tree(tokenizer: Any, document: Any) -> dict[str, Any]:
    """A document as `lmtune preview --json` gives it: text, input_ids `[T]`, tokens `[T]`, trained `[T]`."""
    ids = [int(token) for token in document.input_ids]
    return {
        "text": tokenizer.decode(ids), "input_ids": ids, "tokens": [token_text(tokenizer, token) for token in ids],
        "trained": [bool(flag) for flag in document.loss_mask],
    }  # fmt: skip


def token_text(tokenizer: Any, token: int) -> str:
    """One token, with white space and what has no glyph made visible."""
    piece, text = str(tokenizer.convert_ids_to_tokens(token)), _decoded(tokenizer, [token])
    if "\N{LOWER ONE EIGHTH BLOCK}" in piece:  # SentencePiece's blank, which decoding alone drops
        text = piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
    elif _INCOMPLETE in text:
        return _bytes(piece)
    return _visible(text)


def _pieces(
    tokenizer: Any, input_ids: Sequence[int], trained: Sequence[bool]
) -> Iterator[tuple[str, int, bool]]:  # fmt: skip
    """(text, number of tokens, whether learned) of each token; those that share a character come together."""
    ids = [int(token) for token in input_ids]
    start = 0
    while start < len(ids):
        count, learned = 1, bool(trained[start])
        text = token_text(tokenizer, ids[start])
        if _INCOMPLETE in _decoded(tokenizer, ids[start : start + 1]):
            for end in range(start + 2, min(start + _MAX_PARTS, len(ids)) + 1):
                if bool(trained[end - 1]) != learned:
                    break
                if _INCOMPLETE not in (together := _decoded(tokenizer, ids[start:end])):
                    text, count = _visible(together), end - start
                    break
        yield text, count, learned
        start += count


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
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
