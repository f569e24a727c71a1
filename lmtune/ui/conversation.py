"""What the browser tabs of an app talk about, without a line of Gradio: who answers, and how answers are followed.

A model answers in a thread of its own for each answer, and takes turns with other answers token by token. A tab's
handler looks a few times a second at what was said, so the page is redrawn at that rate, not at the model's, and with
many tabs at work more rarely. What a tab has said is kept on the server under the tab's own key: two tabs never see
each other's text, and what a browser sends as history is not believed.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lmtune.errors import LmtuneError
from lmtune.generation import ChatSession, GenerationOptions
from lmtune.models.inference import LoadedModel

Mode = Literal["tuned", "base", "both"]
MODES: tuple[Mode, ...] = ("tuned", "base", "both")
MAX_TABS = 1000  # conversations kept; the one unused for longest goes first
_MAX_CACHES = 16  # of them, how many keep their KV caches; the others read their conversation again when it goes on
_REDRAW_SECONDS = 0.05
_REDRAW_SECONDS_EACH = 0.004  # more for each answer under way, so that drawing never crowds out answering


@dataclass(frozen=True)
class Settings:
    """How a tab wants to be answered.

    Attributes:
        model: index of the model.
        mode: with the adapter, without it, or both side by side.
        system: system prompt; empty is that of training.
        options: how an answer is chosen.
    """

    model: int
    mode: Mode
    system: str
    options: GenerationOptions


class Conversation:
    """One tab's conversation. In mode `both` it has two columns, which hear the same questions."""

    def __init__(self, models: Sequence[LoadedModel], activity: Activity) -> None:
        self._models, self._activity = models, activity
        self.columns = [ChatSession(models[0])]

    def send(self, text: str, settings: Settings) -> AsyncIterator[None]:
        """Ask `text`; the iterator gives control at each change, and stops the answer when it is abandoned.

        Raises:
            LmtuneError: from the iterator, whatever went wrong in answering.
        """
        return self._follow(settings, lambda session, base: session.stream(text, settings.options, base))

    def retry(self, settings: Settings) -> AsyncIterator[None]:
        """Answer the last question anew."""
        return self._follow(settings, lambda session, base: session.retry(settings.options, base))

    def edit(self, index: int, text: str, settings: Settings) -> AsyncIterator[None]:
        """Put `text` in place of the question at `index` of the messages, and answer it."""
        return self._follow(settings, lambda session, base: session.edit(index, text, settings.options, base))

    def stop(self) -> None:
        """End the answers under way."""
        for session in self.columns:
            session.stop()

    def clear(self) -> None:
        """Forget everything said."""
        for session in self.columns:
            session.clear()

    def release(self) -> None:
        """Free the KV caches."""
        for session in self.columns:
            session.release()

    def num_tokens(self) -> int:
        """Tokens of the answers under way, or just given."""
        return sum(session.num_answer_tokens for session in self.columns)

    def arrange(self, settings: Settings) -> None:
        """Take up a change of model, system prompt or mode; what was said stays, and a second column begins with it."""
        model = self._models[settings.model]
        first = self.columns[0]
        if first.model is not model:
            first.stop()
            first = ChatSession(model, messages=first.messages)
            self.columns = [first]
        if settings.mode == "both" and len(self.columns) == 1:
            self.columns.append(ChatSession(model, messages=first.messages))
        elif settings.mode != "both" and len(self.columns) == 2:
            self.columns.pop().stop()
        for session in self.columns:
            session.system = settings.system.strip() or None

    async def _follow(
        self, settings: Settings, ask: Callable[[ChatSession, bool], Iterator[str]]
    ) -> AsyncIterator[None]:
        self.arrange(settings)
        columns = list(self.columns)
        bases = [False, True] if settings.mode == "both" else [settings.mode == "base"]
        streams = [ask(session, base) for session, base in zip(columns, bases, strict=True)]
        with self._activity.answering(self):
            answers = [asyncio.wrap_future(_exhaust(stream)) for stream in streams]
            seen = -1
            try:
                while True:
                    _, running = await asyncio.wait(answers, timeout=self._activity.redraw_seconds)
                    if (now := sum(session.num_answer_tokens for session in columns)) != seen:
                        seen = now
                        yield
                    if not running or any(answer.done() and answer.exception() for answer in answers):
                        break
                for answer in answers:
                    if answer.done():
                        answer.result()
            except Exception:
                self.columns = self.columns[:1]  # what the other heard may differ; it begins anew
                raise
            finally:
                for session, answer in zip(columns, answers, strict=True):
                    if not answer.done():
                        session.stop()


class Activity:
    """What is going on in the whole app."""

    def __init__(self) -> None:
        self.closing = False
        self.num_pages_drawing = 0  # with an answer under way, or its end not yet handed over
        self._under_way: list[Conversation] = []

    @property
    def num_answering(self) -> int:
        """Conversations with an answer under way."""
        return len(self._under_way)

    @property
    def redraw_seconds(self) -> float:
        """How long a tab waits between two looks at its answer."""
        return _REDRAW_SECONDS + _REDRAW_SECONDS_EACH * len(self._under_way)

    @contextlib.contextmanager
    def answering(self, conversation: Conversation) -> Iterator[None]:
        """Count an answer while the block runs.

        Raises:
            LmtuneError: the app is closing.
        """
        if self.closing:
            raise LmtuneError("the app is closing; start it again to go on")
        self._under_way.append(conversation)
        try:
            yield
        finally:
            self._under_way.remove(conversation)

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Count a page that shows an answer while the block runs."""
        self.num_pages_drawing += 1
        try:
            yield
        finally:
            self.num_pages_drawing -= 1

    def stop_all(self) -> None:
        """End every answer."""
        for conversation in list(self._under_way):
            conversation.stop()


class Tabs:
    """The conversations of all browser tabs, by key."""

    def __init__(self, models: Sequence[LoadedModel], activity: Activity) -> None:
        self._models, self.activity = models, activity
        self._conversations: OrderedDict[tuple[str, str], Conversation] = OrderedDict()
        self._guard = threading.Lock()

    def of(self, key: tuple[str, str]) -> Conversation:
        """The conversation of the tab `key` (user, session), a new one if it is new here."""
        with self._guard:
            conversation = self._conversations.pop(key, None) or Conversation(self._models, self.activity)
            self._conversations[key] = conversation
            while len(self._conversations) > MAX_TABS:
                self._conversations.popitem(last=False)[1].clear()
            if len(self._conversations) > _MAX_CACHES:
                list(self._conversations.values())[-_MAX_CACHES - 1].release()
            return conversation

    def close(self, key: tuple[str, str]) -> None:
        """Forget a tab that was closed."""
        with self._guard:
            conversation = self._conversations.pop(key, None)
        if conversation is not None:
            conversation.clear()

    def __len__(self) -> int:
        return len(self._conversations)


def _exhaust(stream: Iterator[str]) -> concurrent.futures.Future[None]:
    """Run `stream` to its end in a thread; what goes wrong is the future's exception."""
    future: concurrent.futures.Future[None] = concurrent.futures.Future()

    def run() -> None:
        try:
            for _ in stream:
                pass
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, name="lmtune-answer", daemon=True).start()
    return future
