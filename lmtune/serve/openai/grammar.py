"""Answers that keep to a JSON schema, by llguidance: https://github.com/guidance-ai/llguidance.

Of the libraries for this it is one without dependencies; xgrammar brings a build of Triton.
"""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from lmtune.data.rendering import Renderer
from lmtune.errors import LmtuneError
from lmtune.serve.openai.errors import ApiError
from lmtune.serve.openai.schemas import ResponseFormat

# As `json.dumps` writes it. White space that is free is where a small model stays for ever.
_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Makes grammars for the answers of one model.

    Args:
        renderer: of the model.
        vocab_size: V of its logits.
    """

    def __init__(self, renderer: Renderer, vocab_size: int) -> None:
        self._renderer, self._vocab_size = renderer, vocab_size
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()

    def of_format(self, format: ResponseFormat) -> AnswerGrammar:
        """What keeps answers to a format other than `text`; the first call takes up to some seconds.

        Raises:
            ApiError: the schema cannot be kept to.
        """
        schema: dict[str, Any] = {"type": "object"}
        if format.type == "json_schema":
            if format.json_schema is None or format.json_schema.schema_ is None:
                raise ApiError(400, "response_format.json_schema.schema: missing", param="response_format")
            schema = format.json_schema.schema_
        with self._lock:
            if self._tokenizer is None:
                stops = list(self._renderer.stop_token_ids)
                self._tokenizer = from_tokenizer(self._renderer.tokenizer, self._vocab_size, stops)
        try:
            text = f"start: %json {json.dumps({'x-guidance': _FORM, **schema})}"
            matcher = LLMatcher(self._tokenizer, text)
            fault = matcher.get_error()
        except (ValueError, TypeError, RecursionError) as error:
            fault = str(error)
        if fault:
            message = f"response_format: the schema cannot be kept to: {fault}"
            raise ApiError(400, message, param="response_format", code="invalid_json_schema")
        return AnswerGrammar(text, matcher, self._renderer, self._vocab_size)


class AnswerGrammar:
    """A `Grammar` of answers; their reasoning, and what names a channel, are free."""

    def __init__(self, text: str, matcher: LLMatcher, renderer: Renderer, vocab_size: int) -> None:
        self.text = text
        self._matcher, self._renderer, self._vocab_size = matcher, renderer, vocab_size

    def constraint(self) -> AnswerConstraint:
        """See `Grammar`."""
        return AnswerConstraint(self._matcher.deep_copy(), self._renderer, self._vocab_size)


class AnswerConstraint:
    """A `Constraint` of one answer."""

    def __init__(self, matcher: LLMatcher, renderer: Renderer, vocab_size: int) -> None:
        self._matcher, self._renderer, self._vocab_size = matcher, renderer, vocab_size
        self._before: list[int] | None = [] if renderer.answer_mark else None

    def allowed(self) -> torch.Tensor | None:
        """See `Constraint`."""
        if self._before is not None:
            return None
        if self._matcher.is_stopped():
            allowed = torch.zeros(self._vocab_size, dtype=torch.bool)
            allowed[list(self._renderer.stop_token_ids)] = True
            return allowed
        words = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(words, bitorder="little")[: self._vocab_size].astype(bool))

    def advance(self, token: int) -> None:
        """See `Constraint`."""
        if self._before is not None:
            self._before.append(token)
            if self._renderer.answer_mark in self._renderer.marked_text(self._before):
                self._before = None
        elif not self._matcher.consume_token(token):
            raise LmtuneError(f"response_format: the schema cannot be kept to: {self._matcher.get_error()}")
