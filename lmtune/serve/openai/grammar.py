"""Answers that keep to a JSON schema, or are a call, by llguidance: https://github.com/guidance-ai/llguidance.

Of the libraries for this it is one without dependencies; xgrammar brings a build of Triton.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
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
        return self._grammar(f"start: {_json(schema)}", self._renderer.answer_mark, "response_format")

    def of_calls(self, tools: Sequence[str], name: str | None = None) -> AnswerGrammar:
        """What makes answers one call of a tool.

        Args:
            tools: as `read_tools` gives them.
            name: of the tool; None for any.

        Raises:
            ApiError: there is no such tool, or calls of this model are no JSON.
        """
        frame, functions = self._renderer.call_frame, [json.loads(tool)["function"] for tool in tools]
        if not functions:
            raise ApiError(400, "tool_choice: needs tools", param="tool_choice")
        if frame is None:
            message = "tool_choice: this model's template does not write calls as JSON behind a name; expected auto"
            raise ApiError(400, message, param="tool_choice")
        chosen = [function for function in functions if name in (None, function["name"])]
        if not chosen:
            known = ", ".join(function["name"] for function in functions)
            raise ApiError(400, f"tool_choice: {name}; expected one of {known}", param="tool_choice")
        before, between, after = map(self._literal, frame)
        rules = [
            f"call_{number}: {self._literal(json.dumps(function['name'])[1:-1])} {between} "
            + _json(_parameters(function))
            for number, function in enumerate(chosen)
        ]
        either = " | ".join(f"call_{number}" for number in range(len(chosen)))
        text = "\n".join([f"start: {before} ({either}) {after}", *rules])
        return self._grammar(text, self._renderer.reasoning_end, "tools")

    def token_bytes(self, token: int) -> bytes:
        """What a token says; of one inside a character a part of its UTF-8."""
        return bytes(self._read_tokenizer().decode_bytes([token]))

    def _read_tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                stops = list(self._renderer.stop_token_ids)
                size = max(self._vocab_size, len(self._renderer.tokenizer))  # a tokenizer may know more than a model
                self._tokenizer = from_tokenizer(self._renderer.tokenizer, size, stops)
            return self._tokenizer

    def _literal(self, text: str) -> str:
        """A text in the grammar, with control tokens as such."""
        added = self._renderer.tokenizer.added_tokens_decoder
        special = {str(token): index for index, token in added.items() if token.special}
        marks = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        parts = re.split(f"({marks})", text) if marks else [text]
        return " ".join(f"<[{special[part]}]>" if part in special else json.dumps(part) for part in parts if part)

    def _grammar(self, text: str, starts_after: str, param: str) -> AnswerGrammar:
        try:
            matcher = LLMatcher(self._read_tokenizer(), text)
            fault = matcher.get_error()
        except (ValueError, TypeError, RecursionError) as error:
            fault = str(error)
        if fault:
            message = f"{param}: the schema cannot be kept to: {_plain(fault)}"
            raise ApiError(400, message, param=param, code="invalid_json_schema")
        return AnswerGrammar(text, starts_after, matcher, self._renderer, self._vocab_size)


def _plain(fault: str) -> str:
    """A fault without the parser's state and the grammar around the schema."""
    fault = re.split(r"\n +\d+ \| |\n<state>", fault)[0]
    if fault.startswith("NoExtensionBias"):
        return "no answer does"
    return " ".join(re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", fault).split())


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a tool's arguments."""
    schema = function.get("parameters")
    if schema is None:
        return {"type": "object"}
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        message = f"tools: parameters of {function['name']}; expected the JSON schema of an object"
        raise ApiError(400, message, param="tools", code="invalid_json_schema")
    return {"type": "object", **schema}


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({'x-guidance': _FORM, **schema})}"


class AnswerGrammar:
    """A `Grammar` of answers; their reasoning, and what names a channel, are free."""

    def __init__(
        self, text: str, starts_after: str, matcher: LLMatcher, renderer: Renderer, vocab_size: int
    ) -> None:  # fmt: skip
        self.text, self.starts_after = text, starts_after
        self._matcher, self._renderer, self._vocab_size = matcher, renderer, vocab_size

    def constraint(self) -> AnswerConstraint:
        """See `Grammar`."""
        return AnswerConstraint(self._matcher.deep_copy(), self.starts_after, self._renderer, self._vocab_size)


class AnswerConstraint:
    """A `Constraint` of one answer."""

    def __init__(self, matcher: LLMatcher, starts_after: str, renderer: Renderer, vocab_size: int) -> None:
        self._matcher, self._starts_after, self._renderer, self._vocab_size = (
            matcher,
            starts_after,
            renderer,
            vocab_size,
        )
        self._before: list[int] | None = [] if starts_after else None

    def allowed(self) -> torch.Tensor | None:
        """See `Constraint`."""
        if self._before is not None:
            return None
        if self._matcher.is_stopped() and not self._matcher.is_error():
            allowed = torch.zeros(self._vocab_size, dtype=torch.bool)
            allowed[list(self._renderer.stop_token_ids)] = True
            return allowed
        words = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise LmtuneError(f"the answer cannot keep to its form: {_plain(self._matcher.get_error())}")
        return torch.from_numpy(np.unpackbits(words, bitorder="little")[: self._vocab_size].astype(bool))

    def advance(self, token: int) -> None:
        """See `Constraint`."""
        if self._before is not None:
            self._before.append(token)
            if self._starts_after in self._renderer.marked_text(self._before):
                self._before = None
        elif not self._matcher.consume_token(token):
            raise LmtuneError(f"the answer cannot keep to its form: {_plain(self._matcher.get_error())}")
