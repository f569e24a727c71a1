"""`/v1/chat/completions`: the answer of the assistant, with reasoning, tools and log-probabilities."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from lmtune.data.tools import read_tools
from lmtune.data.turns import parse_turns
from lmtune.data.types import ToolCall
from lmtune.data.values import RowFault
from lmtune.errors import ModelError
from lmtune.inference.request import Grammar, Request
from lmtune.serve.openai.answers import Answer, Answering, Call, finish_reason, leaving, spoken
from lmtune.serve.openai.bodies import Tree, chat_logprobs, check_length, event_stream, head_of, sampling_of, usage_of
from lmtune.serve.openai.catalog import Catalog, Served
from lmtune.serve.openai.errors import ApiError
from lmtune.serve.openai.schemas import ChatRequest, NamedTool
from lmtune.serve.openai.text import ChatText, Piece


def chat_routes(catalog: Catalog, answering: Answering, max_tokens: int) -> APIRouter:
    """The route; `max_tokens` is where an answer is cut whose request does not say it."""
    router = APIRouter(prefix="/v1")

    @router.post("/chat/completions")
    async def create_chat_completion(body: ChatRequest, http: HttpRequest) -> Response:
        """Answer a conversation."""
        served = await catalog.find(body.model)
        tools = _tools(body, served)
        prompt = _prompt(body, served, tools)
        samplings = sampling_of(body, served.model, body.max_completion_tokens or body.max_tokens or max_tokens)
        num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs: true", param="top_logprobs")
        grammar: Grammar | None = None
        if isinstance(body.tool_choice, NamedTool) or body.tool_choice == "required":
            name = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
            grammar = await run_in_threadpool(served.grammars.of_calls, tools, name)
        elif body.response_format is not None and body.response_format.type != "text":
            grammar = await run_in_threadpool(served.grammars.of_format, body.response_format)
        requests = [Request(prompt, sampling, served.model.members, num_logprobs, grammar) for sampling in samplings]
        with answering.beginning(served) as call:
            call.num_prompt_tokens = len(prompt)
            answers = call.ask(requests)
            most_calls = 1 if body.parallel_tool_calls is False else None
            texts = [ChatText(served.renderer, body.stops, bool(tools), most_calls) for _ in answers]
        head = head_of(served, "chatcmpl", "chat.completion")
        if body.stream:
            return event_stream(_chunks(head, body, call, answers, texts), http, answering, call)
        with answering.ending(call):
            async with leaving(http, call):
                choices = await _choices(call, answers, texts)
                call.check()
        return JSONResponse({**head, "choices": choices, "usage": usage_of(call)})

    return router


def _tools(body: ChatRequest, served: Served) -> tuple[str, ...]:
    if not body.tools or body.tool_choice == "none":
        return ()
    if (fault := served.renderer.tools_fault) is not None:
        raise ApiError(400, f"tools: {fault}", param="tools")
    try:
        return read_tools({"tools": body.tools}, [])
    except RowFault as wrong:
        raise ApiError(400, wrong.reason, param="tools") from None


def _prompt(body: ChatRequest, served: Served, tools: Sequence[str]) -> list[int]:
    """The tokens before the answer."""
    if body.messages[-1].get("role") == "assistant":
        message = "messages: the last turn is the assistant's; expected a question, or the result of a tool"
        raise ApiError(400, message, param="messages")
    try:
        turns = parse_turns(body.messages, "messages", "question").messages
        prompt = list(served.renderer.prompt_ids(turns, tools))
    except RowFault as wrong:
        raise ApiError(400, wrong.reason, param="messages") from None
    except ModelError as error:
        raise ApiError(400, str(error), param="messages") from None
    check_length(prompt, served.model, "messages")
    return prompt


def _call_trees(calls: Sequence[ToolCall], is_delta: bool) -> list[Tree]:
    return [
        {**({"index": index} if is_delta else {}), "id": f"call_{secrets.token_hex(12)}", "type": "function",
         "function": {"name": call.name, "arguments": call.arguments}}
        for index, call in enumerate(calls)
    ]  # fmt: skip


async def _choices(call: Call, answers: Sequence[Answer], texts: Sequence[ChatText]) -> list[Tree]:
    said: list[list[Piece]] = [[] for _ in answers]
    async for place, _, piece in spoken(answers, texts):
        said[place].append(piece)
    choices: list[Tree] = []
    for index, (answer, text, pieces) in enumerate(zip(answers, texts, said, strict=True)):
        content, reasoning = ("".join(part) for part in zip(*((p.content, p.reasoning) for p in pieces), strict=True))
        calls = _call_trees(pieces[-1].calls, is_delta=False)
        message: Tree = {"role": "assistant", "content": content if content or not calls else None, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        found = answer.logprobs
        choices.append({
            "index": index, "message": message, "finish_reason": "tool_calls" if calls else finish_reason(answer, text),
            "logprobs": chat_logprobs(call.served, found) if found else None,
        })  # fmt: skip
    return choices


async def _chunks(
    head: Tree, body: ChatRequest, call: Call, answers: Sequence[Answer], texts: Sequence[ChatText]
) -> AsyncIterator[Tree]:
    head = {**head, "object": "chat.completion.chunk"}
    counts = body.stream_options is not None and body.stream_options.include_usage
    if counts:
        head["usage"] = None

    def chunk(index: int, delta: Tree, reason: str | None = None, logprobs: Tree | None = None) -> Tree:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**head, "choices": [choice]}

    for index in range(len(answers)):
        yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
    async for index, tokens, piece in spoken(answers, texts):
        answer = answers[index]
        delta: Tree = {}
        if piece.reasoning:
            delta["reasoning_content"] = piece.reasoning
        if piece.content:
            delta["content"] = piece.content
        if piece.calls:
            delta["tool_calls"] = _call_trees(piece.calls, is_delta=True)
        new = answer.logprobs[-len(tokens) :] if tokens else ()
        if delta or new:
            yield chunk(index, delta, None, chat_logprobs(call.served, new) if new else None)
        if tokens is None:
            yield chunk(index, {}, "tool_calls" if piece.calls else finish_reason(answer, texts[index]))
    if counts:
        yield {**head, "choices": [], "usage": usage_of(call)}
