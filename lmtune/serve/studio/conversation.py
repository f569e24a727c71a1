"""The conversations of the browser tabs, without a line of Gradio: who answers, how answers are followed, what stays.

A model answers in a thread of its own for each answer, and gives all answers under way a token in one pass. A tab's
handler looks a few times a second at the answer, so the page is redrawn at that rate. A conversation is kept under the
tab's own key: two tabs never see each other's text. The browser keeps a copy (`to_json`), with which a page that is
loaded again goes on (`restore_json`). Every speaker, a model with or without its adapter, has a session of its own.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lmtune.data.types import Message
from lmtune.errors import LmtuneError
from lmtune.inference.chat import AnswerInfo, ChatSession
from lmtune.inference.chat_model import ChatModel
from lmtune.inference.request import Sampling

Mode = Literal["tuned", "base", "both"]
Turn = tuple[Message, AnswerInfo | None]
Speaker = tuple[int, bool]  # index of the model, and whether it answers without its adapter
MODES: dict[Mode, tuple[bool, ...]] = {"tuned": (False,), "base": (True,), "both": (False, True)}
MAX_TABS = 1000  # conversations kept; the least recently used goes first
_MAX_JSON = 400_000  # characters; a request may hold a million bytes, and a browser keeps a few million
_VERSION = 1  # of the copy
_REDRAW_SECONDS = 0.05
_REDRAW_SECONDS_EACH = 0.004  # more for each answer under way, so that drawing never crowds out answering


@dataclass(frozen=True)
class Settings:
    """The settings panel of a tab: index of the model, mode, system prompt (empty: that of training), sampling."""

    model: int
    mode: Mode
    system: str
    sampling: Sampling


class Conversation:
    """One tab's conversation. In mode `both` it has two columns, which hear the same questions."""

    def __init__(self, models: Sequence[ChatModel], activity: Activity) -> None:
        self._models, self._activity = models, activity
        self._shown: list[Speaker] = [(0, False)]
        self._sessions: dict[Speaker, ChatSession] = {(0, False): ChatSession(models[0])}

    @property
    def columns(self) -> list[ChatSession]:
        """The sessions of those who answer now."""
        return [self._sessions[speaker] for speaker in self._shown]

    def send(self, text: str, settings: Settings) -> AsyncIterator[None]:
        """Ask `text`; the iterator gives control at each change, and stops the answer when it is abandoned.

        Raises:
            LmtuneError: from the iterator, whatever went wrong in answering.
        """
        return self._follow(settings, lambda session, base: session.stream(text, settings.sampling, base))

    def retry(self, settings: Settings) -> AsyncIterator[None]:
        """Answer the last question anew."""
        return self._follow(settings, lambda session, base: session.retry(settings.sampling, base))

    def edit(self, index: int, text: str, settings: Settings) -> AsyncIterator[None]:
        """Put `text` in place of the question at `index` of the messages, and answer it."""
        return self._follow(settings, lambda session, base: session.edit(index, text, settings.sampling, base))

    def continue_answers(self, settings: Settings) -> AsyncIterator[None]:
        """Go on with the answers that were cut at the limit of tokens."""

        def ask(session: ChatSession, base: bool) -> Iterator[str]:
            cut = session.can_continue or not any(column.can_continue for column in self.columns)
            return session.continue_answer(settings.sampling) if cut else iter(())

        return self._follow(settings, ask)

    def undo(self) -> str:
        """Take back the last question with its answers; returns the question, or nothing."""
        question, *_ = [session.undo() for session in self.columns]
        return question or ""

    def stop(self) -> None:
        """End the answers under way."""
        for session in self.columns:
            session.stop()

    def clear(self) -> None:
        """Forget all turns."""
        for session in self.columns:
            session.clear()
        self._sessions = {speaker: self._sessions[speaker] for speaker in self._shown}

    def num_tokens(self) -> int:
        """Tokens of the answers under way, or just given."""
        return sum(session.num_answer_tokens for session in self.columns)

    def prompt_progress(self) -> tuple[int, int]:
        """How many tokens of the prompts are read, and how many they have."""
        read, whole = zip(*(session.prompt_progress for session in self.columns), strict=True)
        return sum(read), sum(whole)

    def choose(self, model: int, mode: Mode) -> None:
        """Let others answer from here on; an answer under way is stopped, earlier turns stay."""
        chosen = [(model, base) for base in MODES[mode]]
        if chosen == self._shown:
            return
        self.stop()
        before = dict(zip(self._shown, self.columns, strict=True))
        for speaker in chosen:
            if speaker not in before:
                same_side = [session for (_, base), session in before.items() if base == speaker[1]]
                self._sessions[speaker] = self._session_after(speaker, (same_side or [*before.values()])[0].turns)
        self._shown = chosen

    def to_json(self) -> str:
        """The conversation as the browser keeps it; nothing of one that is empty, or too long to be sent back."""
        rest = [speaker for speaker in self._sessions if speaker not in self._shown]
        sessions = [
            [self._models[index].name, base, [_turn_to_json(*turn) for turn in self._sessions[index, base].turns]]
            for index, base in (*self._shown, *rest)
        ]
        text = json.dumps([_VERSION, len(self._shown), sessions], separators=(",", ":"))
        return text if any(turns for *_, turns in sessions) and len(text) <= _MAX_JSON else ""

    def restore_json(self, text: str) -> tuple[int, Mode] | None:
        """Go on with what `to_json` gave; returns the model and mode of then, None if `text` is not in that form."""
        known = {model.name: index for index, model in enumerate(self._models)}
        try:
            version, num_columns, sessions = json.loads(text)
            found = {
                (known[name], base): self._session((known[name], base), _turns_from_json(turns))
                for name, base, turns in sessions
            }
            shown = [*found][:num_columns]
            mode = next(mode for mode, bases in MODES.items() if bases == tuple(base for _, base in shown))
        except (TypeError, ValueError, LookupError, StopIteration, RecursionError):
            return None
        if version != _VERSION:
            return None
        self._sessions |= found
        self._shown = shown
        return shown[0][0], mode

    def _session(self, speaker: Speaker, turns: Sequence[Turn]) -> ChatSession:
        messages, infos = [message for message, _ in turns], [info for _, info in turns]
        return ChatSession(self._models[speaker[0]], messages=messages, infos=infos)

    def _session_after(self, speaker: Speaker, turns: list[Turn]) -> ChatSession:
        """The session in which `speaker` goes on after `turns`, with its own answers to the first of the questions."""
        own = self._sessions.get(speaker)
        mine = own.turns if own is not None else []
        same = 0
        while same < min(len(mine), len(turns)) and mine[same][0] == turns[same][0]:
            same += 2  # a question and its answer
        if own is not None and len(mine) == len(turns) <= same:
            return own
        return self._session(speaker, [*mine[:same], *turns[same:]])

    async def _follow(
        self, settings: Settings, ask: Callable[[ChatSession, bool], Iterator[str]]
    ) -> AsyncIterator[None]:
        self.choose(settings.model, settings.mode)
        for session in self.columns:
            session.system = settings.system.strip() or None
        columns, speakers = list(self.columns), list(self._shown)
        before = [session.turns for session in columns]
        streams = [ask(session, base) for session, (_, base) in zip(columns, speakers, strict=True)]
        with self._activity.answering(self):
            answers = [asyncio.wrap_future(_exhaust(stream)) for stream in streams]
            seen: tuple[int, ...] = ()
            try:
                while True:
                    _, running = await asyncio.wait(answers, timeout=self._activity.redraw_seconds)
                    if (now := tuple(_progress(session) for session in columns)) != seen:
                        seen = now
                        yield
                    if not running or any(answer.done() and answer.exception() for answer in answers):
                        break
                for answer in answers:
                    if answer.done():
                        answer.result()
            except Exception:
                if len(columns) > 1:
                    self._roll_back(columns, before)
                raise
            finally:
                for session, answer in zip(columns, answers, strict=True):
                    if not answer.done():
                        session.stop()

    def _roll_back(self, columns: list[ChatSession], before: list[list[Turn]]) -> None:
        """Take back a question that not all could answer."""
        for speaker, session in list(self._sessions.items()):
            if session in columns:
                session.stop()
                self._sessions[speaker] = self._session(speaker, before[columns.index(session)])


def _turn_to_json(message: Message, info: AnswerInfo | None) -> list[Any]:
    if info is None:
        return [message.content]
    return [message.content, info.model, info.use_base, info.finish_reason or "stopped"]


def _turns_from_json(turns: Sequence[Sequence[Any]]) -> list[Turn]:
    found: list[Turn] = []
    for (question,), (answer, *info) in zip(turns[::2], turns[1::2], strict=True):
        found += [(Message("user", question), None), (Message("assistant", answer), AnswerInfo(*info))]
    return found


def _progress(session: ChatSession) -> int:
    """A number that changes whenever there is more to show."""
    return session.num_answer_tokens + sum(session.prompt_progress)


class Activity:
    """Which answers are under way in the whole app."""

    def __init__(self) -> None:
        self.closing = False
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
            raise LmtuneError("the app is closing; start it again to continue")
        self._under_way.append(conversation)
        try:
            yield
        finally:
            self._under_way.remove(conversation)

    def stop_all(self) -> None:
        """End every answer."""
        for conversation in list(self._under_way):
            conversation.stop()


class Tabs:
    """The conversations of all browser tabs, by key."""

    def __init__(self, models: Sequence[ChatModel], activity: Activity) -> None:
        self._models, self.activity = models, activity
        self._conversations: OrderedDict[tuple[str, str], Conversation] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, key: tuple[str, str]) -> Conversation:
        """The conversation of the tab `key` (user, session), a new one if it is new here."""
        with self._lock:
            conversation = self._conversations.pop(key, None) or Conversation(self._models, self.activity)
            self._conversations[key] = conversation
            while len(self._conversations) > MAX_TABS:
                self._conversations.popitem(last=False)[1].clear()
            return conversation

    def close(self, key: tuple[str, str]) -> None:
        """Forget a tab that was closed."""
        with self._lock:
            conversation = self._conversations.pop(key, None)
        if conversation is not None:
            conversation.clear()


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
