"""Answers as they come, for many clients at once: engines in threads of their own, awaited from the server's loop.

    async for tokens in answer: …      # as many as there are by now
    answer.finish_reason               # at the end

A client that leaves ends its answers. There is a bound on how many requests are under way, since each holds its prompt.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Protocol

from starlette.requests import Request as HttpRequest

from lmtune.inference.base import Background, Engine
from lmtune.inference.request import Generation, Request, TokenLogprobs
from lmtune.serve.openai.catalog import Served
from lmtune.serve.openai.errors import ApiError
from lmtune.serve.openai.metrics import Metrics
from lmtune.serve.openai.text import Piece

# How long an answer waits between two looks for news, for each request under way: a chunk of HTTP costs as much
# processor time as a token of a small model, so with many clients chunks hold several tokens.
_PAUSE_SECONDS_EACH, _LONGEST_PAUSE_SECONDS = 0.0015, 0.1
_FINISH = {"stop": "stop", "length": "length", "context": "length", "stopped": "stop"}


class Answer(AsyncIterator[list[int]]):
    """One answer under way; gives the tokens that are new.

    Attributes:
        num_tokens: so far.
    """

    def __init__(self, engine: Background[Answer], request: Request, began: Call) -> None:
        self.num_tokens = 0
        self._call, self._news, self._is_over = began, asyncio.Event(), False
        self._generation: Generation = engine.submit(request, self)

    @property
    def finish_reason(self) -> str:
        """In OpenAI's words."""
        return _FINISH[self._generation.finish_reason or "stop"]

    @property
    def logprobs(self) -> Sequence[TokenLogprobs]:
        """Of all tokens so far."""
        return self._generation.logprobs[: self.num_tokens]

    def wake(self) -> None:
        """There may be news; from the loop's thread."""
        self._news.set()

    async def __anext__(self) -> list[int]:
        tokens: list[int] = []
        while not tokens:
            if self._is_over:
                raise StopAsyncIteration
            if self.num_tokens and not self._generation.is_over:
                await asyncio.sleep(self._call.pause_seconds)
            if not self._generation.has_news and not self._generation.is_over:
                await self._news.wait()
                self._news.clear()
            while self._generation.has_news and not self._is_over:
                token = next(self._generation, None)
                if token is None:
                    self._is_over = True
                else:
                    tokens.append(token)
            self._is_over = self._is_over or (self._generation.is_over and not self._generation.has_news)
        if not self.num_tokens:
            self._call.has_begun()
        self.num_tokens += len(tokens)
        return tokens

    def cancel(self) -> None:
        """End it."""
        self._generation.cancel()
        self._news.set()


class Call:
    """A request of a client: its answers, and what is counted of it."""

    def __init__(self, answering: Answering, served: Served) -> None:
        self.served, self._answering = served, answering
        self._start, self._has_begun = time.monotonic(), False
        self.answers: list[Answer] = []
        self.num_prompt_tokens = 0
        self.is_left = False

    @property
    def pause_seconds(self) -> float:
        """How long an answer waits between two looks for news."""
        return min(_LONGEST_PAUSE_SECONDS, _PAUSE_SECONDS_EACH * self._answering.num_answering)

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """Begin to answer."""
        engine = self._answering.engine(self.served.model.engine)
        self.answers += [Answer(engine, request, self) for request in requests]
        return self.answers

    def has_begun(self) -> None:
        """The first token of all is there."""
        if not self._has_begun:
            self._has_begun = True
            self._answering.metrics.began(self.served.name, time.monotonic() - self._start)

    def leave(self) -> None:
        """The client is gone."""
        self.is_left = True
        for answer in self.answers:
            answer.cancel()

    def check(self) -> None:
        """ApiError if its answers were cut, for a client that is there: then the server closes."""
        if self.is_left:
            raise ApiError(503, "the server closed before the answer was whole; ask again", code="server_closing")

    def end(self, status: str) -> None:
        """Count it, once it is over."""
        for answer in self.answers:
            answer.cancel()
        tokens, seconds = sum(answer.num_tokens for answer in self.answers), time.monotonic() - self._start
        status = "left" if self.is_left else status
        self._answering.metrics.answered(self.served.name, status, self.num_prompt_tokens, tokens, seconds)


class Answering:
    """All requests of a server that are under way.

    Args:
        max_requests: under way at once; more are refused with 429, which clients try again.

    Attributes:
        closing: no further request is taken.
    """

    def __init__(self, metrics: Metrics, max_requests: int = 256) -> None:
        self.metrics, self.closing = metrics, False
        self._max_requests, self._calls = max_requests, set[Call]()
        self._engines: dict[Engine, Background[Answer]] = {}

    @property
    def num_answering(self) -> int:
        """Requests under way."""
        return len(self._calls)

    def engine(self, engine: Engine) -> Background[Answer]:
        """An engine that runs by itself; from the server's loop."""
        if (running := self._engines.get(engine)) is None:
            loop = asyncio.get_running_loop()

            def tell(answers: Sequence[Answer]) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(_wake, answers)

            running = self._engines[engine] = engine.background(tell)
        return running

    @contextlib.contextmanager
    def beginning(self, served: Served) -> Iterator[Call]:
        """Take a request, which an error inside ends; whoever takes it calls `finish`.

        Raises:
            ApiError: there are too many, or the server is closing.
        """
        if self.closing:
            raise ApiError(503, "the server is closing; try again when it is back", code="server_closing")
        if len(self._calls) >= self._max_requests:
            message = f"{len(self._calls)} requests are under way; expected fewer; try again in a second"
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"retry-after": "1"})
        call = Call(self, served)
        self._calls.add(call)
        self.metrics.running(len(self._calls))
        try:
            yield call
        except BaseException:
            self.finish(call, "error")
            raise

    def finish(self, call: Call, status: str) -> None:
        """A request is over; to say it again changes nothing."""
        if call in self._calls:
            self._calls.discard(call)
            call.end(status)
            self.metrics.running(len(self._calls))

    @contextlib.contextmanager
    def ending(self, call: Call) -> Iterator[None]:
        """Whatever happens inside, the request is over after it."""
        status = "error"
        try:
            yield
            status = "ok"
        except (asyncio.CancelledError, GeneratorExit):
            call.is_left = True
            raise
        finally:
            self.finish(call, status)

    def stop_all(self) -> None:
        """End every answer."""
        for call in list(self._calls):
            call.leave()

    def close(self) -> None:
        """Stop the engines' threads."""
        for engine in self._engines.values():
            engine.close()


def _wake(answers: Sequence[Answer]) -> None:
    for answer in answers:
        answer.wake()


@contextlib.asynccontextmanager
async def leaving(request: HttpRequest, call: Call) -> AsyncIterator[None]:
    """Inside, a client that closes the connection ends its answers."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        call.leave()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


async def merged(answers: Sequence[Answer]) -> AsyncIterator[tuple[int, list[int] | None]]:
    """The tokens of several answers as they come, each with the answer's place; None at its end."""
    if len(answers) == 1:
        async for new in answers[0]:
            yield 0, new
        yield 0, None
        return
    pending = {asyncio.ensure_future(anext(answer, None)): place for place, answer in enumerate(answers)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for one in done:
                place, tokens = pending.pop(one), one.result()
                yield place, tokens
                if tokens is not None:
                    pending[asyncio.ensure_future(anext(answers[place], None))] = place
    finally:
        for one in pending:
            one.cancel()


class _Text(Protocol):
    """What tokens become: one of `lmtune.serve.openai.text`."""

    @property
    def has_ended(self) -> bool: ...

    def feed(self, tokens: Sequence[int]) -> Piece: ...

    def finish(self) -> Piece: ...


async def spoken(
    answers: Sequence[Answer], texts: Sequence[_Text]
) -> AsyncIterator[tuple[int, list[int] | None, Piece]]:
    """As `merged`, with what the tokens say; a stop string in it ends its answer."""
    async for place, tokens in merged(answers):
        piece = texts[place].finish() if tokens is None else texts[place].feed(tokens)
        if texts[place].has_ended:
            answers[place].cancel()
        yield place, tokens, piece


def finish_reason(answer: Answer, text: _Text) -> str:
    """Why an answer has ended, in OpenAI's words."""
    return "stop" if text.has_ended else answer.finish_reason
