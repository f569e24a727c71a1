"""Letting a model speak: a conversation streamed piece by piece, and batches of greedy answers for evaluation.

    session = ChatSession(load_for_inference("runs/support"), system="Be brief.")
    for piece in session.stream("Where is my parcel?", GenerationOptions(temperature=0.7, seed=1)):
        print(piece, end="", flush=True)

The prompt is `Renderer.prompt_ids`, token for token what training put before an answer, and an answer ends at the
renderer's stop tokens. A session keeps the KV cache of what the model has read, so a further turn costs only its own
tokens. Reading happens one forward pass at a time under the model's lock: several conversations share one model and
take turns token by token, some with the adapter and some without. Of a model's own generation settings only its stop
tokens count, so that chat and evaluation answer alike.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lmtune.data.types import Message
from lmtune.errors import ConfigError, LmtuneError
from lmtune.inference.engine import PieceDecoder, ReadTokens, ReplyDecoder, Sampler
from lmtune.inference.load import LoadedModel
from lmtune.io.text import format_list, is_finite_number
from lmtune.models.structure import max_positions

MAX_NEW_TOKENS = 8192


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is chosen.

    Attributes:
        temperature: 0 always takes the likeliest token; 1 is the model's own distribution.
        top_p: sample only among the likeliest tokens that together have this probability; 1 is all.
        max_new_tokens: where an answer that does not stop is cut.
        seed: equal seeds give equal answers.

    Raises:
        ConfigError: naming every value that is out of bounds.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = []
        if not is_finite_number(self.temperature) or self.temperature < 0:
            wrong.append(f"temperature: got {self.temperature!r}; should be a number, 0 or more")
        if not is_finite_number(self.top_p) or not 0 < self.top_p <= 1:
            wrong.append(f"top_p: got {self.top_p!r}; should be above 0 and at most 1")
        if not _is_whole(self.max_new_tokens) or not 1 <= self.max_new_tokens <= MAX_NEW_TOKENS:
            wrong.append(
                f"max_new_tokens: got {self.max_new_tokens!r}; should be a whole number from 1 to {MAX_NEW_TOKENS}"
            )
        if not _is_whole(self.seed) or not 0 <= self.seed < 2**32:
            wrong.append(f"seed: got {self.seed!r}; should be a whole number from 0 to 4294967295")
        if wrong:
            raise ConfigError(wrong[0] if len(wrong) == 1 else f"{len(wrong)} options are wrong\n{format_list(wrong)}")


FinishReason = Literal["stop", "length", "context", "stopped"]


@dataclass(frozen=True)
class AnswerInfo:
    """Who gave an answer, and how it ended.

    Attributes:
        model: the model's name.
        use_base: given without the adapter; None for a model that has none.
        finish_reason: `stop` by itself, `length` cut at `max_new_tokens`, `context` cut where the model can read no
            further, `stopped` by the user; None while it is under way.
    """

    model: str
    use_base: bool | None = None
    finish_reason: FinishReason | None = None


class ChatSession:
    """One conversation with one model. A new question, `retry`, `edit` or `clear` ends an answer still under way.

    Attributes:
        model: who answers.
        system: the system prompt; without one, that of training if there was any.
        remembers: whether earlier turns are part of the prompt. A model without a chat template has no form for them
            and was trained on single questions, so each question then stands alone.
    """

    def __init__(
        self,
        model: LoadedModel,
        system: str | None = None,
        messages: Sequence[Message] = (),
        infos: Sequence[AnswerInfo | None] = (),
    ) -> None:
        """A conversation that begins with `messages`, without reading anything yet.

        Args:
            model: who answers.
            system: the system prompt.
            messages: what was said before, by this model or another.
            infos: one for each of `messages`, None for questions; by default nothing is known.
        """
        self.model = model
        self.system = system
        self.remembers = model.renderer.uses_chat_template
        self._history = list(messages)
        self._infos = list(infos) or [None] * len(self._history)
        self._turn: _Turn | None = None  # the answer after `_history`: under way, or said
        self._memories: dict[bool, ReadTokens] = {}  # by use_base: the two read the same tokens differently
        self._guard = threading.Lock()

    @property
    def messages(self) -> list[Message]:
        """The user's and the assistant's turns, the one under way with what was said so far."""
        with self._guard:
            return self._said()

    @property
    def turns(self) -> list[tuple[Message, AnswerInfo | None]]:
        """`messages`, each answer with who gave it and how it ended."""
        with self._guard:
            return list(zip(self._said(), self._said_infos(), strict=True))

    @property
    def num_answer_tokens(self) -> int:
        """How long the last answer is, or is so far."""
        turn = self._turn
        return 0 if turn is None else len(turn.token_ids)

    @property
    def prompt_progress(self) -> tuple[int, int]:
        """How many tokens of the last prompt are read, and how many it has; (0, 0) before there is one."""
        turn = self._turn
        return (0, 0) if turn is None else (turn.num_read, turn.num_prompt)

    @property
    def can_continue(self) -> bool:
        """Whether `continue_answer` has something to go on from."""
        turn = self._turn
        return turn is not None and turn.finish_reason == "length"

    def stream(self, user_text: str, options: GenerationOptions | None = None, use_base: bool = False) -> Iterator[str]:
        """Ask, and get the reply in pieces of text; abandoning the iterator stops it.

        Reasoning, however the template lays it out, stands before the answer in <think> tags; `split_reply` of
        `lmtune.data.replies` takes a reply apart.

        Args:
            user_text: the question.
            options: how the answer is chosen; by default greedily.
            use_base: answer without the adapter.

        Raises:
            LmtuneError: the conversation is longer than the model can read. The question is then taken back, as
                after any other error.
        """
        return self._answer(None, user_text, options, use_base)

    def reply(self, user_text: str, options: GenerationOptions | None = None, use_base: bool = False) -> str:
        """`stream`, in one piece."""
        return "".join(self.stream(user_text, options, use_base))

    def retry(self, options: GenerationOptions | None = None, use_base: bool = False) -> Iterator[str]:
        """Answer the last question anew.

        Raises:
            LmtuneError: nothing was asked yet.
        """
        asked = [index for index, message in enumerate(self.messages) if message.role == "user"]
        if not asked:
            raise LmtuneError("there is no question yet that could be answered anew")
        return self._answer(asked[-1], self.messages[asked[-1]].content, options, use_base)

    def edit(
        self, index: int, user_text: str, options: GenerationOptions | None = None, use_base: bool = False
    ) -> Iterator[str]:
        """Put `user_text` in place of the question `messages[index]`, drop what came after, and answer it.

        Raises:
            LmtuneError: `messages[index]` is no question.
        """
        messages = self.messages
        if not 0 <= index < len(messages) or messages[index].role != "user":
            raise LmtuneError(f"message {index} is no question of yours, so it cannot be edited")
        return self._answer(index, user_text, options, use_base)

    def continue_answer(self, options: GenerationOptions | None = None) -> Iterator[str]:
        """Go on with the last answer from where `max_new_tokens` cut it; gives what comes after the cut.

        Raises:
            LmtuneError: the last answer was not cut, or is not of this session.
        """
        turn = self._turn
        if turn is None or not self.can_continue:
            raise LmtuneError("the last answer was not cut at the limit, so there is nothing to continue; ask instead")
        return self._run(-1, None, options or GenerationOptions(), turn.use_base, turn.token_ids)

    def undo(self) -> str | None:
        """Take back the last question with its answer; returns the question, None if there is none."""
        with self._guard:
            self.stop()
            messages, infos = self._said(), self._said_infos()
            asked = [index for index, message in enumerate(messages) if message.role == "user"]
            if not asked:
                return None
            self._history, self._infos, self._turn = messages[: asked[-1]], infos[: asked[-1]], None
            return messages[asked[-1]].content

    def room_for_answer(self, user_text: str) -> int:
        """How many tokens fit behind the conversation with `user_text` asked next; 0 where that itself does not fit."""
        limit = max_positions(self.model.model)
        if limit is None:
            return MAX_NEW_TOKENS
        return max(0, limit - len(self._prompt([*self.messages, Message("user", user_text)])))

    def stop(self) -> None:
        """End the answer under way at its next token; may be called from any thread."""
        turn = self._turn
        if turn is not None:
            turn.stopped.set()

    def clear(self) -> None:
        """Begin anew; the system prompt stays."""
        with self._guard:
            self.stop()
            self._history, self._infos, self._turn = [], [], None
            self._memories.clear()

    def release(self) -> None:
        """Free the KV cache; the conversation stays and is read again when it goes on."""
        with self._guard:
            self._memories.clear()

    def _said(self) -> list[Message]:
        if self._turn is None:
            return list(self._history)
        return [*self._history, Message("assistant", self._turn.text)]

    def _said_infos(self) -> list[AnswerInfo | None]:
        if self._turn is None:
            return list(self._infos)
        turn = self._turn
        reason = turn.finish_reason or ("stopped" if turn.stopped.is_set() else None)
        use_base = turn.use_base if self.model.has_adapter else None
        return [*self._infos, AnswerInfo(self.model.name, use_base, reason)]

    def _prompt(self, history: Sequence[Message]) -> list[int]:
        """The tokens before the answer to the last question of `history`."""
        turns = history if self.remembers else history[-1:]
        system = [Message("system", self.system)] if self.system else []
        with self.model.lock:  # a tokenizer is not for several threads at once
            return list(self.model.renderer.prompt_ids([*system, *turns]))

    def _decode(self, token_ids: list[int]) -> str:
        with self.model.lock:
            return self.model.renderer.marked_text(token_ids)

    def _answer(
        self, keep: int | None, user_text: str, options: GenerationOptions | None, use_base: bool
    ) -> Iterator[str]:
        """Keep the first `keep` messages (None: all), ask `user_text`, and stream the answer."""
        if not user_text.strip():
            raise LmtuneError("the question is empty; type something")
        return self._run(keep, user_text, options or GenerationOptions(), use_base and self.model.has_adapter)

    def _run(
        self, keep: int | None, user_text: str | None, options: GenerationOptions, use_base: bool,
        begun: Sequence[int] = (),
    ) -> Iterator[str]:  # fmt: skip
        """Stream the answer to `user_text` after the first `keep` messages, or go on with the answer `begun`."""
        turn = _Turn(use_base)
        with self._guard:
            self.stop()
            before = self._history, self._infos, self._turn
            asked = [] if user_text is None else [Message("user", user_text)]
            self._history = [*self._said()[:keep], *asked]
            self._infos = [*self._said_infos()[:keep], *(None for _ in asked)]
            self._turn, history = turn, self._history
            memory = self._memories.pop(use_base, None) or ReadTokens(self.model, use_base)
        decoder = ReplyDecoder(PieceDecoder(self._decode), self.model.renderer.reply_parser())
        for token in begun:
            turn.token_ids.append(token)
            turn.text += decoder.add(token)
        try:
            for piece in self._pieces(self._prompt(history), memory, options, turn, decoder):
                turn.text += piece
                yield piece
        except Exception:
            with self._guard:
                if self._turn is turn:
                    self._history, self._infos, self._turn = before
            raise
        finally:
            turn.finish_reason = turn.finish_reason or "stopped"
            turn.stopped.set()
            with self._guard:
                if self._turn is turn and memory.is_whole:
                    self._memories[use_base] = memory

    def _pieces(
        self, prompt: list[int], memory: ReadTokens, options: GenerationOptions, turn: _Turn, decoder: ReplyDecoder
    ) -> Iterator[str]:
        """The answer to `prompt`, or what comes after the tokens that `turn` has already, as text."""
        prompt = [*prompt, *turn.token_ids]
        room = self._room_after(prompt)
        choose = Sampler(options.temperature, options.top_p, options.seed)
        turn.num_prompt = len(prompt)
        for logits in memory.read_prompt(prompt):  # noqa: B007 - the last is used below
            turn.num_read = len(memory.token_ids)
            if turn.stopped.is_set():
                return
        budget = options.max_new_tokens if room is None else min(options.max_new_tokens, room)
        for left in range(budget, 0, -1):
            token = choose(logits)
            if turn.stopped.is_set():
                break
            if token in self.model.renderer.stop_token_ids:
                turn.finish_reason = "stop"
                break
            turn.token_ids.append(token)
            if piece := decoder.add(token):
                yield piece
            if left > 1:
                logits = memory.read([token])
        else:
            turn.finish_reason = "context" if budget == room else "length"
        if piece := decoder.finish():
            yield piece

    def _room_after(self, prompt: list[int]) -> int | None:
        """How many tokens fit behind `prompt`; None without a limit."""
        limit = max_positions(self.model.model)
        if limit is not None and len(prompt) >= limit:
            raise LmtuneError(
                f"the conversation is {len(prompt)} tokens long, and {self.model.name} reads at most {limit}; "
                "clear it, or shorten the question or the system prompt"
            )
        return None if limit is None else limit - len(prompt)


class _Turn:
    """One answer: what was said so far, by whom, and whether it should end."""

    def __init__(self, use_base: bool) -> None:
        self.use_base = use_base
        self.text = ""
        self.token_ids: list[int] = []
        self.num_prompt = self.num_read = 0
        self.finish_reason: FinishReason | None = None
        self.stopped = threading.Event()


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
