"""Which token has this text? Servers name tokens by their text, each kind of tokenizer writes it in its own way.

    numbers = TokenNumbers(tokenizer)
    numbers.of(" Paris"), numbers.of("<|im_end|>"), numbers.of(42)

A part of a character, which a server cannot write as text, has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmtune.export.served import Token, Tops

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPACE = "▁"  # of SentencePiece
_UNREADABLE = "�"


class TokenNumbers:
    """The vocabulary of one tokenizer, of which the model knows the first `size` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
        self._numbers: dict[str, int] = dict(tokenizer.get_vocab())
        self._added = set(tokenizer.get_added_vocab())
        self._size = size
        self._is_bytes = "Ġ" in self._numbers or any(token.startswith("Ġ") for token in self._numbers)

    def of(self, token: Token) -> int | None:
        """Its number; None where it is not told apart."""
        number = token if isinstance(token, int) else self._of_text(token)
        return number if number is not None and 0 <= number < self._size else None

    def tops(self, tops: Tops) -> dict[int, float]:
        """Log-probabilities by number, of the tokens that have one."""
        found = ((self.of(token), value) for token, value in tops.items())
        return {number: value for number, value in found if number is not None}

    def _of_text(self, text: str) -> int | None:
        if not text or _UNREADABLE in text:
            return None
        if text in self._added:
            return self._numbers.get(text)
        if self._is_bytes:
            from tokenizers.pre_tokenizers import ByteLevel

            pieces = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
            written = "".join(piece for piece, _ in pieces)
        else:
            written = text.replace(" ", _SPACE)
        coded = text.encode()
        byte = f"<0x{coded[0]:02X}>" if len(coded) == 1 else ""  # as SentencePiece writes a line end
        return next((self._numbers[name] for name in (written, text, byte) if name in self._numbers), None)
