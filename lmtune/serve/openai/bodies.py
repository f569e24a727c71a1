"""What both kinds of answers are made of: sampling, usage, log-probabilities, chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence

from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse

from lmtune.data.rendering import Renderer
from lmtune.inference.chat_model import ChatModel
from lmtune.inference.request import Sampling, TokenLogprobs
from lmtune.serve.openai.answers import Answering, Call, leaving
from lmtune.serve.openai.catalog import Served
from lmtune.serve.openai.errors import ApiError, as_api_error
from lmtune.serve.openai.schemas import ChatRequest, CompletionRequest

Tree = dict[str, object]


def sampling_of(body: ChatRequest | CompletionRequest, model: ChatModel, max_tokens: int) -> list[Sampling]:
    """How each of the `n` answers is chosen; without a seed they differ from request to request."""
    stops = tuple(model.renderer.stop_token_ids)
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    seed = secrets.randbits(32) if body.seed is None else body.seed
    bias, size = tuple((body.logit_bias or {}).items()), model.engine.vocab_size
    if (over := next((token for token, _ in bias if token >= size), None)) is not None:
        raise ApiError(400, f"logit_bias: token {over}; expected tokens below {size}", param="logit_bias")
    return [
        Sampling(temperature, top_p, max(1, max_tokens), (seed + place) % 2**32, stops, bias)
        for place in range(body.n or 1)
    ]


def check_length(prompt: Sequence[int], model: ChatModel, param: str) -> None:
    """ApiError for a prompt that leaves no room for an answer, or holds nothing."""
    limit = model.engine.max_positions
    if not prompt:
        raise ApiError(400, f"{param}: empty; expected at least one token", param=param)
    if limit is not None and len(prompt) >= limit:
        message = f"{param}: {len(prompt)} tokens; this model reads at most {limit}, with its answer; shorten it"
        raise ApiError(400, message, param=param, code="context_length_exceeded")


def head_of(served: Served, prefix: str, kind: str) -> Tree:
    """What answers of a `kind` and their chunks begin with."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": served.name,
    }  # fmt: skip


def usage_of(call: Call) -> Tree:
    """The tokens of prompts and answers."""
    answered = sum(answer.num_tokens for answer in call.answers)
    return {
        "prompt_tokens": call.num_prompt_tokens, "completion_tokens": answered,
        "total_tokens": call.num_prompt_tokens + answered,
    }  # fmt: skip


def token_text(renderer: Renderer, token: int) -> str:
    """A token alone, as text."""
    return str(renderer.tokenizer.decode([token]))


def chat_logprobs(served: Served, found: Sequence[TokenLogprobs]) -> Tree:
    """As a choice of a chat has them."""

    def entry(token: int, logprob: float) -> Tree:
        said = served.grammars.token_bytes(token)
        return {"token": said.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(said)}

    content = [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(*top) for top in one.top]} for one in found
    ]  # fmt: skip
    return {"content": content, "refusal": None}


def completion_logprobs(renderer: Renderer, found: Sequence[TokenLogprobs | int], start: int = 0) -> Tree:
    """As a choice of a completion has them; `start` is where the text begins. A token alone has no log-probability."""
    texts, logprobs, tops, offsets = [], list[float | None](), list[dict[str, float] | None](), []
    for one in found:
        token = one if isinstance(one, int) else one.token
        texts.append(token_text(renderer, token))
        offsets.append(start)
        start += len(texts[-1])
        if isinstance(one, int):
            logprobs.append(None)
            tops.append(None)
        else:
            logprobs.append(max(one.logprob, -9999.0))
            by_text: dict[str, float] = {}
            for top, logprob in (*one.top, (one.token, one.logprob)):
                by_text.setdefault(token_text(renderer, top), max(logprob, -9999.0))
            tops.append(by_text)
    return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def event_stream(chunks: AsyncIterator[Tree], http: HttpRequest, answering: Answering, call: Call) -> StreamingResponse:
    """Chunks as server-sent events, https://html.spec.whatwg.org/multipage/server-sent-events.html; an error is the
    last one."""

    async def events() -> AsyncIterator[bytes]:
        try:
            with answering.ending(call):
                async with leaving(http, call):
                    async for chunk in chunks:
                        call.check()
                        yield b"data: " + json.dumps(chunk, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"
                    call.check()
            yield b"data: [DONE]\n\n"
        except Exception as error:  # its status was sent long ago
            yield b"data: " + json.dumps(as_api_error(error).body).encode() + b"\n\n"

    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)
