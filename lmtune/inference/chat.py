"""A conversation with a model, streamed piece by piece.

    session = ChatSession(load_for_inference("runs/support"), system="Be brief.")
    for piece in session.stream("Where is my parcel?", Sampling(temperature=0.7, seed=1)):
        print(piece, end="", flush=True)

The prompt is `Renderer.prompt_ids`, token for token what training put before an answer. The engine
keeps what was read, so a further turn costs only its own tokens, and answers all sessions of a model together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from lmtune.data.types import Message
from lmtune.errors import ConfigError, LmtuneError
from lmtune.inference.chat_model import ChatModel
from lmtune.inference.classify import Classifier
from lmtune.inference.load import LoadedModel
from lmtune.inference.request import FinishReason, Generation, Request, Sampling


def check_chats(model: ChatModel) -> None:
    """ConfigError for a model that has nothing to say of a message alone: it scores an answer to a prompt."""
    if model.head is not None and model.head.kind == "reward":
        raise ConfigError(
            f"{model.name}: a reward model, which scores an answer to a prompt; give it rows of prompt and completion, "
            "or pairs: lmtune predict RUN ROWS.jsonl"
        )


_PENDING_TOKENS = 8  # no character is longer; what is still incomplete then is not UTF-8 and is shown as it is


@dataclass(frozen=True)
class AnswerInfo:
    """Who gave an answer, and how it ended.

    Attributes:
        model: the model's name.
        use_base: given without the adapter; None for a model that has none.
        finish_reason: as of `Generation`; None while it is under way.
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
            and was trained on single questions, so each question then stands alone; so it does for a classifier.
        classifier: of a model that says what a message is, instead of an answer; None for a language model.
    """

    def __init__(
        self, model: ChatModel, system: str | None = None, messages: Sequence[Message] = (),
        infos: Sequence[AnswerInfo | None] = (),
    ) -> None:  # fmt: skip
        """A conversation that begins with `messages`; `infos` holds one for each, None for questions."""
        check_chats(model)
        self.model = model
        self.system = system
        self.classifier = Classifier(model) if isinstance(model, LoadedModel) and model.head is not None else None
        self.remembers = model.renderer.uses_chat_template and self.classifier is None
        self._history = list(messages)
        self._infos = list(infos) or [None] * len(self._history)
        self._answer: _Answer | None = None  # to the last question of `_history`: under way, or complete
        self._guard = threading.Lock()

    @property
    def messages(self) -> list[Message]:
        """The user's and the assistant's turns, the one under way with its text so far."""
        return [message for message, _ in self.turns]

    @property
    def turns(self) -> list[tuple[Message, AnswerInfo | None]]:
        """`messages`, each answer with who gave it and how it ended."""
        with self._guard:
            return self._turns()

    @property
    def num_answer_tokens(self) -> int:
        """How long the last answer is, or is so far."""
        return 0 if self._answer is None else len(self._answer.token_ids)

    @property
    def prompt_progress(self) -> tuple[int, int]:
        """How many tokens of the last prompt are read, and how many it has; (0, 0) before there is one."""
        generation = None if self._answer is None else self._answer.generation
        return (0, 0) if generation is None else (generation.num_read, generation.num_prompt_tokens)

    @property
    def can_continue(self) -> bool:
        """Whether `continue_answer` has something to go on from."""
        return self._answer is not None and self._answer.finish_reason == "length"

    def stream(self, user_text: str, sampling: Sampling | None = None, use_base: bool = False) -> Iterator[str]:
        """Ask, and get the reply in pieces of text, reasoning in <think> tags; abandoning the iterator stops it.

        Args:
            user_text: the question.
            sampling: how the answer is chosen; by default greedily.
            use_base: answer without the adapter.

        Raises:
            LmtuneError: the conversation is longer than the model can read. After any error the question is taken back.
        """
        return self._ask(None, user_text, sampling, use_base)

    def reply(self, user_text: str, sampling: Sampling | None = None, use_base: bool = False) -> str:
        """`stream`, in one piece."""
        return "".join(self.stream(user_text, sampling, use_base))

    def retry(self, sampling: Sampling | None = None, use_base: bool = False) -> Iterator[str]:
        """Answer the last question anew."""
        messages = self.messages
        last = _last_question(messages)
        if last is None:
            raise LmtuneError("there is no question yet to answer again")
        return self._ask(last, messages[last].content, sampling, use_base)

    def edit(
        self, index: int, user_text: str, sampling: Sampling | None = None, use_base: bool = False
    ) -> Iterator[str]:
        """Put `user_text` in place of the question `messages[index]`, drop what came after, and answer it."""
        messages = self.messages
        if not 0 <= index < len(messages) or messages[index].role != "user":
            raise LmtuneError(f"message {index} is not a question of yours, so it cannot be edited")
        return self._ask(index, user_text, sampling, use_base)

    def continue_answer(self, sampling: Sampling | None = None) -> Iterator[str]:
        """Go on with the last answer from where `max_new_tokens` cut it; gives what comes after the cut."""
        answer = self._answer
        if answer is None or not self.can_continue:
            raise LmtuneError("the last answer was not cut at the limit, so there is nothing to continue; ask instead")
        return self._run(-1, None, sampling or Sampling(), answer.use_base, answer.token_ids)

    def undo(self) -> str | None:
        """Take back the last question with its answer; returns the question, None if there is none."""
        with self._guard:
            self.stop()
            turns = self._turns()
            last = _last_question([message for message, _ in turns])
            if last is None:
                return None
            self._set(turns[:last])
            return turns[last][0].content

    def room_for_answer(self, user_text: str) -> int | None:
        """How many tokens fit behind the conversation with `user_text` asked next, 0 or less where that itself does
        not fit; None without a limit."""
        limit = self.model.engine.max_positions
        return None if limit is None else limit - len(self._prompt([*self.messages, Message("user", user_text)]))

    def stop(self) -> None:
        """End the answer under way at its next token; may be called from any thread."""
        if self._answer is not None:
            self._answer.stop()

    def clear(self) -> None:
        """Begin anew; the system prompt stays."""
        with self._guard:
            self.stop()
            self._set([])

    def _turns(self) -> list[tuple[Message, AnswerInfo | None]]:
        turns = list(zip(self._history, self._infos, strict=True))
        if (answer := self._answer) is not None:
            use_base = answer.use_base if self.model.has_adapter else None
            info = AnswerInfo(self.model.name, use_base, answer.finish_reason)
            turns.append((Message("assistant", answer.text), info))
        return turns

    def _set(self, turns: Sequence[tuple[Message, AnswerInfo | None]], answer: _Answer | None = None) -> None:
        self._history, self._infos = [message for message, _ in turns], [info for _, info in turns]
        self._answer = answer

    def _prompt(self, history: Sequence[Message]) -> list[int]:
        """The tokens before the answer to the last question of `history`."""
        if self.classifier is not None:
            with self.model.lock:
                return self.classifier.read(history[-1].content, self.system)
        turns = history if self.remembers else history[-1:]
        system = [Message("system", self.system)] if self.system else []
        with self.model.lock:  # a tokenizer is not for several threads at once
            renderer = self.model.renderer
            said = [renderer.as_message(turn.content) if turn.role == "assistant" else turn for turn in turns]
            return list(renderer.prompt_ids([*system, *said]))

    def _text_of(self, token_ids: list[int]) -> str:
        with self.model.lock:
            return self.model.renderer.marked_text(token_ids)

    def _ask(self, keep: int | None, user_text: str, sampling: Sampling | None, use_base: bool) -> Iterator[str]:
        """Keep the first `keep` messages (None: all), ask `user_text`, and stream the answer."""
        if not user_text.strip():
            raise LmtuneError("the question is empty; type something")
        return self._run(keep, user_text, sampling or Sampling(), use_base and self.model.has_adapter)

    def _run(
        self, keep: int | None, user_text: str | None, sampling: Sampling, use_base: bool, begun: Sequence[int] = ()
    ) -> Iterator[str]:
        """Stream the answer to `user_text` after the first `keep` messages, or go on with the answer `begun`."""
        answer = _Answer(use_base)
        with self._guard:
            self.stop()
            before = self._history, self._infos, self._answer
            question = [] if user_text is None else [(Message("user", user_text), None)]
            self._set([*self._turns()[:keep], *question], answer)
            history = self._history
        try:
            for piece in self._pieces(history, sampling, answer, begun):
                answer.text += piece
                yield piece
        except Exception:
            with self._guard:
                if self._answer is answer:
                    self._history, self._infos, self._answer = before
            raise
        finally:
            answer.stop()

    def _pieces(
        self, history: Sequence[Message], sampling: Sampling, answer: _Answer, begun: Sequence[int]
    ) -> Iterator[str]:
        """The answer to `history`, or what comes after the tokens that it has already, as text."""
        if self.classifier is not None:
            yield str(self.classifier.verdicts([self._prompt(history)])[0])
            answer.is_whole = True
            return
        prompt = self._prompt(history)
        detokenizer, parser = Detokenizer(self._text_of), self.model.renderer.reply_parser()
        answer.token_ids += begun
        answer.text += "".join(parser.feed(detokenizer.add(token)) for token in begun)
        prompt = [*prompt, *begun]
        limit = self.model.engine.max_positions
        if limit is not None and len(prompt) >= limit:
            raise LmtuneError(
                f"the conversation is {len(prompt)} tokens long, and {self.model.name} reads at most {limit}; "
                "clear it, or shorten the question or the system prompt"
            )
        sampling = replace(sampling, stop_token_ids=tuple(self.model.renderer.stop_token_ids))
        request = Request(prompt, sampling, self.model.answering(answer.use_base))
        for token in answer.follow(self.model.engine.submit(request)):
            answer.token_ids.append(token)
            if piece := parser.feed(detokenizer.add(token)):
                yield piece
        if piece := parser.feed(detokenizer.finish()) + parser.finish():
            yield piece


class _Answer:
    """One answer: its text and tokens so far, by whom, and whether it should end."""

    def __init__(self, use_base: bool) -> None:
        self.use_base = use_base
        self.text = ""
        self.token_ids: list[int] = []
        self.generation: Generation | None = None
        self.is_whole = False  # though nothing was generated
        self._is_stopped = False

    def follow(self, generation: Generation) -> Generation:
        self.generation = generation
        if self._is_stopped:
            generation.cancel()
        return generation

    def stop(self) -> None:
        self._is_stopped = True
        if self.generation is not None:
            self.generation.cancel()

    @property
    def finish_reason(self) -> FinishReason | None:
        if self.is_whole:
            return "stop"
        ended = None if self.generation is None else self.generation.finish_reason
        return ended or ("stopped" if self._is_stopped else None)


class Detokenizer:
    """Turns tokens into pieces of text as they come, never cut inside a character.

    A token that ends inside a UTF-8 character waits for the next, as in Hugging Face's text-generation-inference.

    Args:
        decode: text of token ids, for example `Renderer.marked_text`.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []  # tokens whose text is out; some tokenizers need them to place a space
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """What can be shown now, maybe nothing."""
        self._pending.append(token)
        text = self._new_text()
        if text and not text.endswith("\ufffd"):
            self._context, self._pending = self._pending, []
            return text
        if len(self._pending) < _PENDING_TOKENS:
            return ""
        self._context, self._pending = [], []
        return text

    def finish(self) -> str:
        """What was held back, less a character that was never completed."""
        return self._new_text().rstrip("\ufffd") if self._pending else ""

    def _new_text(self) -> str:
        return self._decode(self._context + self._pending)[len(self._decode(self._context)) :]


def _last_question(messages: Sequence[Message]) -> int | None:
    return next((index for index in reversed(range(len(messages))) if messages[index].role == "user"), None)
