"""A tokenizer's chat template, rendered to tokens: what stands before an answer, and the answer with its end.

The template is run by transformers with `sanitize_control_tokens`, so that only the template itself writes control
tokens. Two things are found out once, with a probe conversation: the token that ends an answer, and whether reasoning
is passed in a field of its own. A template that ends answers with no token at all ("### Response: …") is amended: the
tokenizer's end token is written after every answer, because a model that never sees an end never stops.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from typing import Any

from lmtune.data.examples import Message
from lmtune.data.template_limits import TemplateLimitError, probe
from lmtune.errors import ModelError

_SYSTEM, _QUESTION, _ANSWER, _REASONING = "probe system", "probe question", "probe answer", "probe reasoning"
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)


class TemplateFault(Exception):
    """The template cannot render one conversation as a prompt and its answer; the text says why."""


class ChatTemplate:
    """One tokenizer's template.

    Attributes:
        source: the Jinja text in use, amended where answers had no end; what a tuned model should be saved with.
        end_token_id: the token that ends an answer.
        is_amended: whether `source` differs from the tokenizer's.
        system_fault: why the template cannot take a system prompt; None if it can.
    """

    def __init__(self, tokenizer: Any, thinking: bool, eos_token_ids: Sequence[int]) -> None:
        """
        Args:
            tokenizer: a transformers tokenizer with a chat template.
            thinking: answers may hold reasoning in <think> tags.
            eos_token_ids: what the model stops at; the first ends answers where the template writes no end.

        Raises:
            ModelError: the template is missing, endless, wrong, or answers have no end.
        """
        if "sanitize_control_tokens" not in inspect.signature(tokenizer.apply_chat_template).parameters:
            raise ModelError(
                f"{type(tokenizer).__name__} cannot keep control tokens in user text apart from the template's; "
                "upgrade transformers, or set data.template: plain"
            )
        self._tokenizer = tokenizer
        self._thinking = thinking
        self._passes_reasoning = False
        self.source = self._checked_source()
        exchange = [Message("user", _QUESTION), Message("assistant", _ANSWER)]
        end = self._token_after_answer(exchange)
        self.is_amended = self._end_opens_next_turn = False
        if end is None:  # GLM models stop by opening the user's next turn
            end = self._token_after_answer([*exchange, exchange[0]])
            self._end_opens_next_turn = end in eos_token_ids
            self.is_amended = not self._end_opens_next_turn
        if self.is_amended:
            self.source = _with_end(self.source, self._end_text(eos_token_ids))
            end = self._token_after_answer(exchange)
        if end is None:
            raise ModelError(
                "the chat template drops what follows an answer, its end included; use data.template: plain"
            )
        self.end_token_id: int = end
        self._end = str(tokenizer.convert_ids_to_tokens(end))
        self._passes_reasoning = thinking and self._renders_reasoning_field()
        self.system_fault = self._find_system_fault()

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The tokens before the assistant's next turn.

        Raises:
            TemplateFault: the template refuses these messages.
        """
        if self.system_fault and messages[0].role == "system":
            raise TemplateFault(self.system_fault)
        ids: list[int] = self._apply(messages, prompt=True)
        return ids

    def answer_ids(self, messages: Sequence[Message], prompt_ids: Sequence[int]) -> list[int]:
        """The tokens of the last message, an answer, as they follow `prompt_ids`; its end token is the last.

        Raises:
            TemplateFault: the template refuses, or renders the answer so that it does not continue the prompt.
        """
        ids = self._apply(messages, prompt=False)
        num_prompt = len(prompt_ids)
        if ids[:num_prompt] == list(prompt_ids):
            answer = ids[num_prompt:]
        else:
            return self._answer_by_text(messages)
        if "</think>" in messages[-1].content:
            self._check_reasoning_kept(messages)
        if self._end_opens_next_turn:
            answer = [*answer, self.end_token_id]
        if self.end_token_id not in answer:
            raise TemplateFault(f"the template does not end this answer with {self._end}")
        return list(answer[: answer.index(self.end_token_id) + 1])

    # --- rendering

    def _apply(self, messages: Sequence[Message], prompt: bool, text: bool = False, source: str | None = None) -> Any:
        """Token ids, or the text if `text`."""
        try:
            return self._tokenizer.apply_chat_template(
                [self._as_dict(message) for message in messages],
                chat_template=source or self.source,
                add_generation_prompt=prompt,
                tokenize=not text,
                sanitize_control_tokens=not text,
                return_dict=False,
                enable_thinking=self._thinking,
            )
        # The template is foreign code, and may fail in any way that Python has.
        except Exception as error:
            reason = str(error).strip() or type(error).__name__
            raise TemplateFault(f"the chat template refuses it: {reason}") from error

    def _as_dict(self, message: Message) -> dict[str, str]:
        if self._passes_reasoning and message.role == "assistant" and (thought := _THOUGHT.fullmatch(message.content)):
            return {"role": "assistant", "reasoning_content": thought[1].strip("\n"), "content": thought[2]}
        return {"role": message.role, "content": message.content}

    def _answer_by_text(self, messages: Sequence[Message]) -> list[int]:
        """The answer encoded on its own, where its first characters would merge with the prompt's last into one token.

        Generation starts from the prompt's own tokens, so this, not the merged token, is what the model must produce.
        """
        content = messages[-1].content
        before = self._apply(messages[:-1], prompt=True, text=True)
        whole = self._apply(messages, prompt=False, text=True)
        if whole.startswith(before):
            body, end, _ = whole[len(before) :].rpartition(self._end)
            if self._end_opens_next_turn:
                body = whole[len(before) :]
            elif not end:
                raise TemplateFault(f"the template does not end this answer with {self._end}")
            if body.strip() != content.strip():
                raise TemplateFault("the template rewrites this answer, so it cannot be learned as it is written")
            return self._encode_answer(body)
        opened, tag, _ = before.rpartition("<think>")
        thought = _THOUGHT.fullmatch(content)
        if self._thinking and tag and thought and whole.startswith(opened) and not before.split("<think>")[-1].strip():
            # DeepSeek-R1: the prompt opens the reasoning, but the rendered answer has lost it.
            return self._encode_answer(thought[1].strip() + "\n", "</think>", "\n\n" + thought[2])
        raise TemplateFault(_mismatch(before, whole, content, self._thinking))

    def _encode_answer(self, text: str, tag: str = "", more: str = "") -> list[int]:
        """`text`, the control token `tag`, `more` and the end token; control tokens in the texts stay text."""
        # Rendered after a control token, as in the whole conversation, which is then taken off. The untaken branch
        # tells transformers which tokens this template holds for control tokens.
        echo = (
            f"{{{{ {_literal(self._end)} + messages[0]['content'] + {_literal(tag)} + messages[1]['content'] }}}}"
            f"{{% if false %}}{self.source}{{% endif %}}"
        )
        ids = self._apply([Message("user", text), Message("user", more)], prompt=False, source=echo)
        return [*ids[1:], self.end_token_id]

    def _check_reasoning_kept(self, messages: Sequence[Message]) -> None:
        thought = _THOUGHT.fullmatch(messages[-1].content)
        if thought and thought[1].strip() not in self._apply(messages, prompt=False, text=True):
            raise TemplateFault(
                "the template drops the answer's <think> part; set data.template: thinking, "
                "or plain if it does so even then"
            )

    # --- what the probes find out

    def _checked_source(self) -> str:
        try:
            source: str = self._tokenizer.get_chat_template()
        except ValueError as error:
            raise ModelError(f"the tokenizer has no usable chat template ({error}); use data.template: plain") from None
        special = {name: str(token) for name, token in self._tokenizer.special_tokens_map.items()}
        try:
            probe(source, tuple(sorted(special.items())))
        except TemplateLimitError as error:
            raise ModelError(f"the chat template is not safe to run: {error}; use data.template: plain") from None
        return source

    def _token_after_answer(self, messages: Sequence[Message]) -> int | None:
        """The control token that the template writes after the answer, with at most white space between."""
        try:
            text: str = self._apply(messages, prompt=False, text=True)
        except TemplateFault as fault:
            raise ModelError(
                f"the chat template fails on a question and its answer: {fault}; use data.template: plain"
            ) from None
        _, found, tail = text.rpartition(_ANSWER)
        if not found or _QUESTION not in text:
            lost = "questions" if found else "answers"
            raise ModelError(f"the chat template drops or rewrites {lost}; use data.template: plain")
        tail = tail.lstrip()
        added = {token.content: index for index, token in self._tokenizer.added_tokens_decoder.items()}
        starting = [content for content in added if content.strip() and tail.startswith(content)]
        return added[max(starting, key=len)] if starting else None

    def _end_text(self, eos_token_ids: Sequence[int]) -> str:
        if not eos_token_ids:
            raise ModelError(
                "the chat template ends answers with no token, and the tokenizer has no EOS token, so the model could "
                "never learn to stop; set the tokenizer's eos_token"
            )
        return str(self._tokenizer.convert_ids_to_tokens(eos_token_ids[0]))

    def _find_system_fault(self) -> str | None:
        try:
            text = self._apply([Message("system", _SYSTEM), Message("user", _QUESTION)], prompt=True, text=True)
        except TemplateFault as fault:
            return str(fault)
        return None if _SYSTEM in text else "the chat template drops system prompts; leave them out"

    def _renders_reasoning_field(self) -> bool:
        self._passes_reasoning = True
        answer = Message("assistant", f"<think>{_REASONING}</think>{_ANSWER}")
        return _REASONING in self._apply([Message("user", _QUESTION), answer], prompt=False, text=True)


def _with_end(source: str, end: str) -> str:
    """The template with `end` written after every answer, by changing the messages before it begins."""
    return (
        "{% set amended = namespace(messages=[]) %}{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}"
        f"{{% set message = dict(message, content=message['content'] + {_literal(end)}) %}}"
        "{% endif %}{% set amended.messages = amended.messages + [message] %}{% endfor %}"
        "{% set messages = amended.messages %}{{ '' }}" + source
    )


def _literal(text: str) -> str:
    """`text` as a string in a Jinja expression."""
    return json.dumps(text, ensure_ascii=False)


def _mismatch(before: str, whole: str, answer: str, thinking: bool) -> str:
    """Why the answer does not continue the prompt, shown where the two part."""
    at = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(len(before), len(whole)))
    if "</think>" in answer and not thinking:
        return "the answer holds a <think> part; set data.template: thinking"
    if "<think>" in before[at:]:
        return (
            "the template opens a <think> part before every answer, and this one has none; write answers as "
            "<think>…</think>… with data.template: thinking, or use plain"
        )
    return (
        f"the template asks for an answer with {before[at : at + 40]!r}, but begins this one with "
        f"{whole[at : at + 40]!r}; training would not match generation, use data.template: plain"
    )
