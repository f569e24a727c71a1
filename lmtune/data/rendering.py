"""From a conversation to the tokens that the model sees, and which are targets. One mechanism for all templates:

    p = tokens(messages before an answer, with the generation prompt)      what inference feeds the model
    f = tokens(messages up to and with the answer)
    trained = f after p, up to and with the token that ends the turn

So what training puts before an answer is by construction what chat and evaluation put there: `prompt_ids` is `p`. Marks
inside the template ({% generation %}) are not needed, and most templates have none. A conversation of several answers
is one sequence as long as each p continues the sequence so far; a template that renders earlier answers differently
once they are history (Qwen3 drops their reasoning) begins a new sequence for each answer instead.

Without a template: prompt, completion and the end token, encoded apart, because generation starts after the prompt's
own tokens. Masking is by position, never by id, so a tokenizer that pads with its end token learns to stop too.

The two answers of a pair are rendered behind the same prompt, one sequence each. A labelled row has no target: it is
what a model reads to classify it, a conversation as the prompt of an answer, a text as the tokenizer encodes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing import connection, get_context, parent_process
from typing import TYPE_CHECKING, Literal

import numpy as np

from lmtune.data.calls import CALL_OPENING, ELSEWHERE, split_calls
from lmtune.data.replies import ReplyFormat, ReplyParser
from lmtune.data.report import RowCounter
from lmtune.data.templates import ChatTemplate, TemplateFault
from lmtune.data.types import Example, Message, TokenSequence, ToolCall
from lmtune.data.values import listed_keys
from lmtune.errors import DataError, LmtuneError, ModelError
from lmtune.io.text import pluralize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["auto", "chat", "plain", "thinking"]
_NO_TOOLS = "plain text has no place for tools"
RENDERING_VERSION = 2  # of the tokens that a row becomes; raised whenever one becomes others, so that no cache is stale


class UnrenderableRow(DataError):
    """A row that the template cannot render; `once`: nor can it any other row of this kind."""

    def __init__(self, message: str, once: bool = False) -> None:
        super().__init__(message)
        self.once = once


class Renderer:
    """Renders examples for training, and prompts for generation, with one tokenizer in one way.

    Attributes:
        tokenizer: as given.
        stop_token_ids: what generation must stop at; the end of an answer first.
        uses_chat_template: whether a template is used, not plain text.
        chat_template: the template in use, to save with a tuned model; None for plain text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: Template = "auto", system: str | None = None,
        eos_token_ids: Sequence[int] = (), now: str | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            tokenizer: a transformers tokenizer.
            template: `chat`, `plain`, `thinking` (chat, answers hold reasoning), or `auto`: chat if there is one.
            system: the system prompt of conversations that have none.
            eos_token_ids: further ends, from the model's generation config.
            now: the time for a template that writes it, as `rendered_at` tells it; None is the time of rendering.

        Raises:
            ModelError: no template where one is demanded, or no token that could end an answer.
        """
        self.tokenizer = tokenizer
        self._system = Message("system", system) if system else None
        self._template = template
        own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        eos_ids = [*own, *eos_token_ids]
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if template in ("chat", "thinking") and not has_template:
            raise ModelError(f"data.template: {template}, but the tokenizer has no chat template; use plain")
        self._chat: ChatTemplate | None = None
        if has_template and template != "plain":
            self._chat = ChatTemplate(tokenizer, template == "thinking", eos_ids, now)
            if self._system is not None and self._chat.system_fault:
                raise ModelError(f"data.system: {self._chat.system_fault}")
        elif not eos_ids:
            raise ModelError(
                "the tokenizer has no EOS token, so the model could never learn to stop; set the tokenizer's eos_token"
            )
        self._end_token_id = self._chat.end_token_id if self._chat else eos_ids[0]
        self._lead_ids, self._tail_ids = self._find_affixes()
        inside = self._chat.reply_format.marks if self._chat else {}  # such a token stands before the answer, too
        ends = [self._end_token_id, *(index for index in eos_ids if index not in inside)]
        if self._chat is not None and self._chat.call_end_id is not None:
            ends.append(self._chat.call_end_id)
        self.stop_token_ids = tuple(dict.fromkeys(ends))
        self.uses_chat_template = self._chat is not None
        self._reply_format = self._chat.reply_format if self._chat else ReplyFormat()
        if self._chat is not None and self._reply_format.lead:
            self._reply_format = replace(self._reply_format, lead=self._lead_as_decoded(self._chat))
        self.chat_template = self._chat.source if self._chat else None

    def render(self, example: Example) -> tuple[TokenSequence, ...]:
        """The example's sequences, each ending in a stop token that is a target; of a labelled one without targets.

        Raises:
            DataError: the example cannot be rendered; names `file:line`.
        """
        try:
            if example.kind == "labelled":
                return (_Tokens().extended(self._read(example), ()).sequence(),)
            if example.text is not None:
                built = [_Tokens().extended(self._lead_ids, self._with_end(example.text))]
            else:
                talks = [talk for talk in (example.messages, example.rejected) if talk]
                built = [
                    tokens for talk in talks for tokens in self._render_answers(self._with_system(talk), example.tools)
                ]
        except TemplateFault as fault:
            raise UnrenderableRow(f"{example.location}: {fault}", fault.once) from None
        sequences = tuple(tokens.sequence() for tokens in built)
        for sequence in sequences:
            if not sequence.loss_mask[-1] or int(sequence.input_ids[-1]) not in self.stop_token_ids:
                raise DataError(
                    f"{example.location}: the rendered answer has no trained end-of-turn token, so the model would not "
                    "stop after it"
                )
        return sequences

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> list[int]:
        """The tokens that training puts before the assistant's next turn.

        Args:
            messages: they end with the user's turn, or with the results of calls.
            tools: that the assistant may call, as `Example` has them.

        Raises:
            ModelError: these messages cannot be rendered, for example several turns without a chat template.
        """
        if not messages or messages[-1].role not in ("user", "tool"):
            raise ModelError("a prompt must end with a message of the user, or with the result of a tool")
        try:
            return self._prompt(self._with_system(messages), tools)
        except TemplateFault as fault:
            raise ModelError(str(fault)) from None

    def decode(self, ids: Sequence[int]) -> str:
        """A reply: the answer, after its reasoning in <think> tags if there is any; without control tokens."""
        parser = self.reply_parser()
        return parser.feed(self.marked_text(ids)) + parser.finish()

    def as_message(self, reply: str) -> Message:
        """What `decode` gives as a turn of a conversation; calls that it has brought into its own form as such."""
        text, calls = split_calls(reply) if self._reply_format.calls is not None else (reply, ())
        return Message("assistant", text, tool_calls=calls)

    @property
    def answer_mark(self) -> str:
        """What a reply says before its answer, in `marked_text`: the end of its reasoning, or the answer's channel."""
        form = self._reply_format
        return form.closing if form.is_opened else form.lead

    @property
    def call_mark(self) -> str | None:
        """What the first call in a reply begins with, empty where it is JSON alone; None if calls cannot be read."""
        if self._reply_format.calls is not None:
            return CALL_OPENING
        form = self._chat.tools.form if self._chat is not None else None
        return form.lead if form is not None and form.is_json else None

    @property
    def call_frame(self) -> tuple[str, str, str] | None:
        """As of `CallFormat`; None where calls cannot be read."""
        form = self._chat.tools.form if self._chat is not None else None
        return None if form is None else form.frame

    @property
    def tools_fault(self) -> str | None:
        """Why a prompt cannot hold tools; None where it can."""
        return _NO_TOOLS if self._chat is None else self._chat.tools.tools_fault

    @property
    def reasoning_end(self) -> str:
        """What ends the reasoning that each reply begins with, in `marked_text`; empty where replies need none."""
        return self._reply_format.closing if self._reply_format.is_opened else ""

    def calls_in(self, reply: str) -> tuple[str, tuple[ToolCall, ...]]:
        """(text, calls) of a reply that `decode` gives; all is text where its calls cannot be read."""
        if self._reply_format.calls is not None:
            return split_calls(reply)
        form = self._chat.tools.form if self._chat is not None else None
        if form is None or not form.is_json or (not form.lead and not reply.lstrip().startswith("{")):
            return reply, ()
        calls = form.read(reply if form.lead else reply.lstrip()) or []
        text = reply[: reply.find(form.lead)].rstrip() if form.lead else ""
        numbered = enumerate(calls, start=1)
        if not calls or not all(isinstance(name, str) and isinstance(given, dict) for name, given in calls):
            return reply, ()
        return text, tuple(
            ToolCall(name, json.dumps(given, ensure_ascii=False), f"call{number:05d}")
            for number, (name, given) in numbered
        )

    def reply_parser(self) -> ReplyParser:
        """What makes a reply of `marked_text`, piece by piece."""
        return ReplyParser(self._reply_format)

    def marked_text(self, ids: Sequence[int]) -> str:
        """A reply's text as the model says it, with the marks of `ReplyFormat`; other control tokens are left out."""
        marks, text, run = self._reply_format.marks, "", list[int]()
        for index in ids:
            if index in marks:
                text, run = text + self._text_of(run) + marks[index], []
            elif index not in self.stop_token_ids:
                run.append(int(index))
        return text + self._text_of(run)

    def plain_text(self, ids: Sequence[int]) -> str:
        """The text of tokens, without control tokens."""
        return self._text_of(list(ids))

    def _text_of(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""

    @property
    def rendered_at(self) -> str | None:
        """The time that the template writes into prompts; None if it writes none."""
        return self._chat.time_now() if self._chat is not None and self._chat.writes_date else None

    @property
    def stop_tokens(self) -> list[str]:
        """What generation must stop at, as text."""
        return [str(self.tokenizer.convert_ids_to_tokens(index)) for index in self.stop_token_ids]

    @property
    def description(self) -> str:
        """One line: which template, how answers end, what generation stops at, and the template's own system prompt."""
        names = [f"{self.tokenizer.convert_ids_to_tokens(index)} ({index})" for index in self.stop_token_ids]
        if self._chat is None:
            how = "plain text, no chat template"
        else:
            how = "the tokenizer's chat template" + (", thinking" if self._template == "thinking" else "")
            if self._chat.is_amended:
                how += f", amended: {self.tokenizer.convert_ids_to_tokens(self._end_token_id)} after every answer"
            if (time := self.rendered_at) is not None:
                begun = "" if time[:10] == self._chat.time_now(given=False)[:10] else ", when this run began"
                how += f", which writes today's date ({time[:10]}{begun})"
        more = f"; generation also stops at {', '.join(names[1:])}" if names[1:] else ""
        words = self._chat.own_words if self._chat is not None and self._system is None else ""
        own = f"; it begins with a system prompt of its own: {words[:100]}{'…' * (len(words) > 100)}" if words else ""
        return f"{how}; answers end in {names[0]}{more}{own}"

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of everything that decides how an example becomes tokens."""
        import transformers

        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        parts = [
            json.dumps([RENDERING_VERSION, self._chat.sample_prompts() if self._chat else []]),
            type(tokenizer).__name__,
            backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True),
            json.dumps({name: str(token) for name, token in tokenizer.special_tokens_map.items()}, sort_keys=True),
            json.dumps([self.chat_template, self._template, self._system and self._system.content]),
            json.dumps([self.stop_token_ids, self._lead_ids, transformers.__version__]),
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    # --- conversations

    def _with_system(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        if self._system is None or not messages or messages[0].role == "system":
            return tuple(messages)
        return (self._system, *messages)

    def _read(self, example: Example) -> list[int]:
        """The tokens of a row without targets."""
        if example.text is not None:
            ids = [*self._lead_ids, *self._encode(example.text), *self._tail_ids]
        else:
            messages = self._with_system(example.messages)
            is_answered = messages[-1].role == "assistant"
            ids = self._prompt(messages[:-1] if is_answered else messages, example.tools)
            ids = [*ids, *self._answer(messages, ids, example.tools)] if is_answered else ids
        if not ids:
            raise TemplateFault("the row has no tokens")
        return ids

    def _render_answers(self, messages: tuple[Message, ...], tools: Sequence[str]) -> list[_Tokens]:
        found: list[_Tokens] = []
        for index, message in enumerate(messages):
            if message.role != "assistant" or not message.trained:
                if message.tool_calls and self._chat is not None:
                    self._chat.check_calls(messages[: index + 1], tools)
                continue
            prompt = self._prompt(messages[:index], tools)
            answer = self._answer(messages[: index + 1], prompt, tools)
            so_far = found[-1].ids if found else []
            if so_far and prompt[: len(so_far)] == so_far:
                found[-1].extended(prompt[len(so_far) :], answer)
            else:
                found.append(_Tokens().extended(prompt, answer))
        return found

    def _prompt(self, messages: tuple[Message, ...], tools: Sequence[str]) -> list[int]:
        if self._chat is not None:
            return self._chat.prompt_ids(messages, tools)
        if tools:
            raise TemplateFault(_NO_TOOLS, ELSEWHERE, once=True)
        system, turns = (messages[:1], messages[1:]) if messages[0].role == "system" else ((), messages)
        if len(turns) != 1:
            raise TemplateFault(
                "a conversation of several turns needs a chat template, which this tokenizer lacks or "
                "data.template: plain ignores; use a model with a chat template"
            )
        text = "\n\n".join(message.content for message in (*system, *turns))
        return [*self._lead_ids, *self._encode(text)]

    def _answer(self, messages: tuple[Message, ...], prompt: list[int], tools: Sequence[str]) -> list[int]:
        if self._chat is not None:
            return self._chat.answer_ids(messages, prompt, tools)
        if messages[-1].tool_calls:
            raise TemplateFault("plain text has no place for tool calls", ELSEWHERE, once=True)
        return self._with_end(messages[-1].content)

    # --- plain text

    def _with_end(self, text: str) -> list[int]:
        ids = self._encode(text)
        if any(index in self.stop_token_ids for index in ids):
            raise TemplateFault("the text itself encodes to a stop token, so generation could not reproduce it")
        return [*ids, self._end_token_id]

    def _encode(self, text: str) -> list[int]:
        """Tokens of plain text; control tokens written in it stay text."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids

    def _lead_as_decoded(self, chat: ChatTemplate) -> str:
        """What is before an answer in a reply's text; SentencePiece drops a blank at its beginning."""
        asked, answer = Message("user", "a question"), "an answer"
        try:
            ids = chat.answer_ids([asked, Message("assistant", answer)], chat.prompt_ids([asked]))
        except TemplateFault:
            return self._reply_format.lead
        return self.marked_text(ids).partition(answer)[0]

    def _find_affixes(self) -> tuple[list[int], list[int]]:
        """The tokens, usually one BOS or none, that the tokenizer puts before any text, and those behind it."""
        bare = self.tokenizer.encode("a", add_special_tokens=False)
        whole = self.tokenizer.encode("a", add_special_tokens=True)
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return list(whole[:start]), list(whole[start + len(bare) :])
        return [], []


@dataclass
class _Tokens:
    """A `TokenSequence` that grows."""

    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)

    def extended(self, context: Sequence[int], targets: Sequence[int]) -> _Tokens:
        """This, with `context` and then `targets` at its end."""
        self.ids += [*context, *targets]
        self.mask += [False] * len(context) + [True] * len(targets)
        return self

    def sequence(self) -> TokenSequence:
        self.mask[0] = False  # nothing predicts the first token
        return TokenSequence(np.array(self.ids, dtype=np.int32), np.array(self.mask, dtype=bool))


_WELL_KNOWN = frozenset(
    {
        "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
        "<|begin_of_text|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|start|>", "<|message|>",
        "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>",
    }
)  # fmt: skip
_SHAPE = re.compile(r"<</?SYS>>|<[^<>\s]{1,60}>|\[[^\[\]\s]{1,40}\]")  # of nearly all; a tokenizer may have 6,000


class ControlText:
    """Counts the rows that hold the text of a control token, of `tokenizer` or of a well-known template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special = {token.content for token in added if token.special}
        self._known = (special | _WELL_KNOWN) - {"<think>", "</think>"}  # which answers may hold
        self._tokens: dict[str, None] = {}  # in the order of their appearance
        self._rows = RowCounter()

    def add(self, example: Example) -> None:
        """Look at one row."""
        if found := [token for text in example.contents for token in _SHAPE.findall(text) if token in self._known]:
            self._rows.add(example.location)
            self._tokens.update(dict.fromkeys(found))

    def warnings(self) -> list[str]:
        """One warning, or none."""
        if not self._rows.count:
            return []
        return [
            f"{pluralize(self._rows.count)} with control tokens as text ({listed_keys(self._tokens, 5)}): "
            f"{self._rows.examples}; they are trained letter by letter, not as tokens; rows that a chat "
            'template rendered before must be messages again: {"messages": [{"role": "user", "content": "…"}, …]}'
        ]


WORTH_BYTES = 32 << 20  # of data; about a minute's work for one processor
_CHUNK_ROWS = 256
_CHUNK_CHARACTERS = 1 << 20
Outcome = tuple[TokenSequence, ...] | DataError
_renderer: Renderer | None = None  # a worker's own


def render_all(
    examples: Iterable[Example], renderer: Renderer, num_bytes: int, num_processes: int | None = None
) -> Iterator[tuple[Example, Outcome]]:
    """Each example with its sequences, or with the `DataError` that says why it has none; in order.

    `num_bytes`, the size of the data, decides whether a pool of processes is worth starting.

    Raises:
        LmtuneError: a process of the pool died.
    """
    if num_processes is None:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_processes = min(16, usable) if num_bytes >= WORTH_BYTES else 1
    if num_processes == 1:
        for example in examples:
            yield example, _render(renderer, example)
        return
    pool = ProcessPoolExecutor(num_processes, get_context("spawn"), initializer=_start_worker, initargs=(renderer,))
    waiting: deque[tuple[list[Example], Future[list[Outcome]]]] = deque()
    try:
        for chunk in _chunks(examples):
            waiting.append((chunk, pool.submit(_render_chunk, chunk)))
            if len(waiting) > 2 * num_processes:
                yield from _finished(waiting)
        while waiting:
            yield from _finished(waiting)
    except BrokenProcessPool:
        raise LmtuneError("a process that renders rows died, perhaps for want of memory; start again") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(waiting: deque[tuple[list[Example], Future[list[Outcome]]]]) -> Iterator[tuple[Example, Outcome]]:
    chunk, future = waiting.popleft()
    yield from zip(chunk, future.result(), strict=True)


def _render(renderer: Renderer, example: Example) -> Outcome:
    try:
        return renderer.render(example)
    except DataError as fault:
        return fault


def _chunks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    chunk: list[Example] = []
    num_characters = 0
    for example in examples:
        chunk.append(example)
        num_characters += example.num_characters
        if len(chunk) >= _CHUNK_ROWS or num_characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, num_characters = [], 0
    if chunk:
        yield chunk


def _start_worker(renderer: Renderer) -> None:
    global _renderer
    _renderer = renderer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed cannot end its pool, so the pool looks for itself."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _render_chunk(chunk: list[Example]) -> list[Outcome]:
    assert _renderer is not None
    return [_render(_renderer, example) for example in chunk]
