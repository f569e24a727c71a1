"""`/v1/completions`: what the model says after a text or after tokens, without a chat template."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from lmtune.inference.request import Request, TokenLogprobs
from lmtune.serve.openai.answers import Answer, Answering, Call, finish_reason, leaving, spoken
from lmtune.serve.openai.bodies import (
    Tree,
    check_length,
    completion_logprobs,
    event_stream,
    head_of,
    sampling_of,
    usage_of,
)
from lmtune.serve.openai.catalog import Catalog, Served
from lmtune.serve.openai.errors import ApiError
from lmtune.serve.openai.schemas import CompletionRequest
from lmtune.serve.openai.text import Piece, PlainText

_MAX_TOKENS = 16  # OpenAI's default


@dataclass
class _Choice:
    """A prompt with one of its answers.

    Attributes:
        prompt: its tokens.
        scored: how probable each of its tokens is, for `echo` with `logprobs`; the first has nothing before it.
        echoed: its text, for `echo`.
        answer: what comes after it; None where nothing is asked for.
    """

    prompt: list[int]
    scored: list[TokenLogprobs | int]
    echoed: str
    text: PlainText
    answer: Answer | None = None


def completion_routes(catalog: Catalog, answering: Answering) -> APIRouter:
    """The route."""
    router = APIRouter(prefix="/v1")

    @router.post("/completions")
    async def create_completion(body: CompletionRequest, http: HttpRequest) -> Response:
        """Go on after one prompt or several."""
        served = await catalog.find(body.model)
        prompts = [_tokens(prompt, served) for prompt in _prompts(body)]
        if len(prompts) * (body.n or 1) > 2048:
            asked = f"{len(prompts)} prompts of {body.n} answers each"
            raise ApiError(400, f"prompt: {asked}; expected at most 2048 answers in all", "prompt")
        asks = body.max_tokens != 0
        if not asks and not body.echo:
            raise ApiError(400, "max_tokens: 0; expected 1 or more, or echo: true", param="max_tokens")
        samplings = sampling_of(body, served.model, _MAX_TOKENS if body.max_tokens is None else body.max_tokens)
        head = head_of(served, "cmpl", "text_completion")
        with answering.beginning(served) as call:
            async with leaving(http, call):
                choices = await _begin(body, call, prompts)
            if asks:
                requests = [
                    Request(choice.prompt, sampling, served.model.members, body.logprobs)
                    for choice, sampling in zip(choices, samplings * len(prompts), strict=True)
                ]
                for choice, answer in zip(choices, call.ask(requests), strict=True):
                    choice.answer = answer
        if body.stream:
            return event_stream(_chunks(head, body, call, choices), http, answering, call)
        with answering.ending(call):
            async with leaving(http, call):
                trees = await _trees(body, call, choices)
                call.check()
        return JSONResponse({**head, "choices": trees, "usage": usage_of(call)})

    return router


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    if isinstance(body.prompt, str):
        return [body.prompt]
    several = [prompt for prompt in body.prompt if not isinstance(prompt, int)]
    return list(several) if several else [[index for index in body.prompt if isinstance(index, int)]]


def _tokens(prompt: str | list[int], served: Served) -> list[int]:
    """The tokens of a prompt; a text begins as the tokenizer begins texts."""
    if isinstance(prompt, str):
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise ApiError(400, "prompt: an unpaired surrogate; expected text", param="prompt") from None
        prompt = [int(index) for index in served.renderer.tokenizer.encode(prompt)]
    ids = prompt
    size = served.model.engine.vocab_size
    if (over := next((index for index in ids if index >= size), None)) is not None:
        raise ApiError(400, f"prompt: token {over}; expected tokens below {size}", param="prompt")
    check_length(ids, served.model, "prompt")
    return ids


async def _begin(body: CompletionRequest, call: Call, prompts: Sequence[list[int]]) -> list[_Choice]:
    """A choice for each answer; with `echo` and `logprobs` the prompts are scored."""
    model, renderer = call.served.model, call.served.renderer
    choices: list[_Choice] = []
    for prompt in prompts:
        call.check()
        call.num_prompt_tokens += len(prompt)
        scored: list[TokenLogprobs | int] = []
        if body.echo and body.logprobs is not None:
            found = await run_in_threadpool(model.engine.score, prompt, model.members, body.logprobs)
            scored = [prompt[0], *found]
        echoed = renderer.plain_text(prompt) if body.echo else ""
        one = _Choice(prompt, scored, echoed, PlainText(renderer, body.stops))
        choices += [replace(one, text=PlainText(renderer, body.stops)) for _ in range(body.n or 1)]
    return choices


async def _spoken(choices: Sequence[_Choice]) -> AsyncIterator[tuple[int, list[int] | None, Piece]]:
    answers = [choice.answer for choice in choices if choice.answer is not None]
    if answers:
        async for place, tokens, piece in spoken(answers, [choice.text for choice in choices]):
            yield place, tokens, piece
    else:
        for place, choice in enumerate(choices):
            yield place, None, choice.text.finish()


def _logprobs(body: CompletionRequest, call: Call, found: Sequence[TokenLogprobs | int], start: int) -> Tree | None:
    return None if body.logprobs is None else completion_logprobs(call.served.renderer, found, start)


def _reason(choice: _Choice) -> str:
    return "length" if choice.answer is None else finish_reason(choice.answer, choice.text)


async def _trees(body: CompletionRequest, call: Call, choices: Sequence[_Choice]) -> list[Tree]:
    said = [choice.echoed for choice in choices]
    async for place, _, piece in _spoken(choices):
        said[place] += piece.content
    return [
        {
            "index": index, "text": text, "finish_reason": _reason(choice),
            "logprobs": _logprobs(body, call, [*choice.scored, *(choice.answer.logprobs if choice.answer else ())], 0),
        }
        for index, (choice, text) in enumerate(zip(choices, said, strict=True))
    ]  # fmt: skip


async def _chunks(
    head: Tree, body: CompletionRequest, call: Call, choices: Sequence[_Choice]
) -> AsyncIterator[Tree]:  # fmt: skip
    counts = body.stream_options is not None and body.stream_options.include_usage
    if counts:
        head = {**head, "usage": None}
    lengths = [0] * len(choices)

    def chunk(index: int, text: str, found: Sequence[TokenLogprobs | int], reason: str | None = None) -> Tree:
        logprobs = _logprobs(body, call, found, lengths[index]) if found else None
        lengths[index] += len(text)
        return {**head, "choices": [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}]}

    if body.echo:
        for index, choice in enumerate(choices):
            yield chunk(index, choice.echoed, choice.scored)
    async for index, tokens, piece in _spoken(choices):
        choice = choices[index]
        new = choice.answer.logprobs[-len(tokens) :] if tokens and choice.answer is not None else ()
        if piece.content or new:
            yield chunk(index, piece.content, new)
        if tokens is None:
            yield chunk(index, "", (), _reason(choice))
    if counts:
        yield {**head, "choices": [], "usage": usage_of(call)}
