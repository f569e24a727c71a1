"""Control tokens that stand in rows as text, which says that the rows were rendered with a chat template before.

Text in a row stays text: `<|im_end|>` written in it is learned letter by letter, so a model tuned on such rows learns
to spell marks and never to end an answer. Rows about templates are rare; rows that were rendered already are not.
"""

from __future__ import annotations

import re
from typing import Any

from lmtune.data.survey import Tally, counted, shown_first
from lmtune.data.types import Example
from lmtune.data.values import quoted

_WELL_KNOWN = frozenset(
    {
        "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
        "<|begin_of_text|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|start|>", "<|message|>",
        "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>",
    }
)  # fmt: skip
_SHAPE = re.compile(r"<</?SYS>>|<[^<>\s]{1,60}>|\[[^\[\]\s]{1,40}\]")  # of nearly all; a tokenizer may have 6,000
_MOST_SHOWN = 5


class ControlText:
    """Counts the rows that hold the text of a control token, of `tokenizer` or of a well-known template."""

    def __init__(self, tokenizer: Any) -> None:
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special = {token.content for token in added if token.special and token.content.strip()}
        self._known = (special | _WELL_KNOWN) - {"<think>", "</think>"}  # which answers may hold
        odd = sorted(token for token in special if not _SHAPE.fullmatch(token))
        self._odd = re.compile("|".join(map(re.escape, odd))) if odd else None
        self._tokens: dict[str, None] = {}  # in the order of their appearance
        self._rows = Tally()

    def add(self, example: Example) -> None:
        """Look at one row."""
        texts = [example.text] if example.text is not None else [message.content for message in example.messages]
        found = [token for text in texts for token in self._tokens_in(text)]
        if found:
            self._rows.add(example.where)
            self._tokens.update(dict.fromkeys(found))

    def _tokens_in(self, text: str) -> list[str]:
        found = [token for token in _SHAPE.findall(text) if token in self._known] if "<" in text or "[" in text else []
        return found + (self._odd.findall(text) if self._odd is not None else [])

    def warnings(self) -> list[str]:
        """One warning, or none."""
        if not self._rows.count:
            return []
        names = [quoted(token) for token in self._tokens]
        shown = ", ".join(names[:_MOST_SHOWN]) + (", …" if len(names) > _MOST_SHOWN else "")
        hold = "holds" if self._rows.count == 1 else "hold"
        return [
            f"{counted(self._rows.count)} {hold} control tokens as text ({shown}): "
            f"{shown_first(self._rows.as_dict())}; they are learned letter by letter, not as tokens; rows that a chat "
            'template rendered before must be messages again: {"messages": [{"role": "user", "content": "…"}, …]}'
        ]
