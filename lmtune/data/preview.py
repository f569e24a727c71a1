"""Rows as the model will see them: token by token, with the learned ones marked.

On a terminal learned tokens are green and underlined; without colour they stand in [brackets] and all others end in a
bar, so a page piped into a file says the same. Blanks, line ends and control characters are made visible.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.text import Text

_LEARNED = ("green underline", "bright_green underline")
_OTHER = ("dim", "")
_VISIBLE = {" ": "·", "\n": "⏎\n", "\t": "⇥"}


def show_tokens(tokenizer: Any, input_ids: Sequence[int], trained: Sequence[bool], colour: bool) -> Text:
    """The tokens `input_ids[T]` in order, those that are `trained[T]` marked as learned."""
    shown = Text()
    for index, (token, learned) in enumerate(zip(input_ids, trained, strict=True)):
        text = token_text(tokenizer, int(token))
        if colour:  # neighbours in different shades, so that one sees where a token ends
            shown.append(text, style=(_LEARNED if learned else _OTHER)[index % 2])
        else:
            bare, newline = (text[:-1], "\n") if text.endswith("\n") else (text, "")
            shown.append((f"[{bare}]" if learned else f"{bare}|") + newline)
    return shown


def token_text(tokenizer: Any, token: int) -> str:
    """One token, with white space and what has no glyph made visible."""
    piece = str(tokenizer.convert_ids_to_tokens(token))
    text = str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if "\N{LOWER ONE EIGHTH BLOCK}" in piece:  # SentencePiece's blank, which decoding alone drops
        text = piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
    elif "\N{REPLACEMENT CHARACTER}" in text:  # a part of a character
        text = piece
    return "".join(_VISIBLE.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)
