"""An `Engine` whose tokens come from a `vllm serve`: token ids are sent, token ids come back.

    engine = VllmEngine("http://127.0.0.1:8001", key, "base", vocab_size=32_000)
    for token in engine.submit(Request(prompt_ids, Sampling(stop_token_ids=(2,)), Members(("support",)))): …

Prompts are rendered, and answers read, by lmtune as for its own engine, so template, stop tokens, tools and reasoning
are those of training. An adapter is a model of its name there. The protocol:
https://docs.vllm.ai/en/stable/serving/openai_compatible_server.html.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic

import httpx

from lmtune.errors import LmtuneError, UnavailableError
from lmtune.inference.base import Waiter
from lmtune.inference.request import FinishReason, Generation, Request, TokenLogprobs
from lmtune.io.text import one_line
from lmtune.models.members import AS_IS, BASE, Members

Tree = Mapping[str, Any]
_End = tuple[FinishReason, LmtuneError | None]

_WATCH_SECONDS = 0.2  # between two looks for answers that were cancelled
_NUMBERED = "token_id:"  # how a token is named where its id is asked for


class VllmEngine:
    """Answers by the completions of a server of vLLM.

    Args:
        url: of the server, without `/v1`.
        key: that it wants.
        base: its name for the model without an adapter.
        vocab_size: V of the model.
        description: what runs where.

    Attributes:
        lock: of nothing but the tokenizers, which several threads use.
    """

    def __init__(self, url: str, key: str, base: str, vocab_size: int, description: str = "vLLM") -> None:
        self.lock: contextlib.AbstractContextManager[bool] = threading.RLock()
        self._url, self._base, self._vocab_size, self._description = f"{url}/v1", base, vocab_size, description
        self._headers = {"authorization": f"Bearer {key}"}
        self._client = httpx.Client(base_url=self._url, headers=self._headers, timeout=httpx.Timeout(None, connect=10))
        self._max_positions = self._read_max_positions()
        self._news = threading.Condition()
        self._tasks: dict[Generation, asyncio.Task[_End]] = {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._stream = httpx.AsyncClient(
            base_url=self._url, headers=self._headers, timeout=httpx.Timeout(None, connect=10), limits=limits
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="lmtune-vllm", daemon=True)
        self._thread.start()

    @property
    def max_positions(self) -> int | None:
        """See `Engine`."""
        return self._max_positions

    @property
    def vocab_size(self) -> int:
        """See `Engine`."""
        return self._vocab_size

    @property
    def description(self) -> str:
        """See `Engine`."""
        return self._description

    def submit(self, request: Request) -> Generation:
        """See `Engine`."""
        return self._begin(request, lambda: None)

    def generate(self, requests: Sequence[Request], advance: Callable[[int], None] | None = None) -> list[list[int]]:
        """See `Engine`."""
        answers = []
        for generation in [self.submit(request) for request in requests]:
            answers.append(list(generation))
            if advance is not None:
                advance(1)
        return answers

    def score(self, token_ids: Sequence[int], members: Members = AS_IS, num_top: int = 0) -> list[TokenLogprobs]:
        """See `Engine`."""
        body = {
            "model": self._model(members), "prompt": list(token_ids), "max_tokens": 1, "temperature": 0,
            "prompt_logprobs": num_top,
        }  # fmt: skip
        places = self._post("/completions", body)["choices"][0]["prompt_logprobs"][1:]
        found = []
        for token, place in zip(token_ids[1:], places, strict=True):
            ranked = sorted(place.items(), key=lambda item: -item[1]["logprob"])
            top = tuple((int(name), float(one["logprob"])) for name, one in ranked[:num_top])
            found.append(TokenLogprobs(token, float(place[str(token)]["logprob"]), top))
        return found

    def background(self, tell: Callable[[Sequence[Waiter]], None]) -> VllmBackground[Waiter]:
        """See `Engine`."""
        return VllmBackground(self._begin, tell)

    def add_adapter(self, name: str, folder: str) -> None:
        """Serve a LoRA adapter of PEFT's form.

        Raises:
            LmtuneError: vLLM refuses it.
        """
        self._post("/load_lora_adapter", {"lora_name": name, "lora_path": folder})

    def close(self) -> None:
        """End all answers."""
        for generation in list(self._tasks):
            generation.cancel()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._client.close()

    def _model(self, members: Members) -> str:
        """The name of who answers.

        Raises:
            LmtuneError: several adapters answer together.
        """
        if members.is_ensemble:
            raise LmtuneError("vLLM answers with one adapter at a time; an ensemble needs lmtune's own engine")
        return self._base if members.adapters in ((), (BASE,)) else members.adapters[0]

    def _post(self, path: str, body: Mapping[str, object]) -> Any:
        try:
            answer = self._client.post(path, json=body)
        except httpx.HTTPError as error:
            raise UnavailableError(f"vLLM does not answer: {one_line(error)}") from error
        if answer.status_code != 200:
            raise _refusal(answer.content)
        return answer.json() if answer.content[:1] == b"{" else None

    def _read_max_positions(self) -> int | None:
        answer = self._client.get("/models")
        if answer.status_code != 200:
            raise _refusal(answer.content)
        limit = answer.json()["data"][0].get("max_model_len")
        return None if limit is None else int(limit)

    # --- answers under way, in a thread with a loop

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        watching = self._loop.create_task(self._watch())
        self._loop.run_forever()
        watching.cancel()
        for task in self._tasks.values():
            task.cancel()
        self._loop.run_until_complete(self._stream.aclose())
        self._loop.close()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            for generation, task in list(self._tasks.items()):
                if generation.is_cancelled:
                    task.cancel()

    def _begin(self, request: Request, told: Callable[[], None]) -> Generation:
        """Stream an answer; `told` is called, in the loop's thread, when it has news."""
        body = self._body(request)
        generation = Generation(len(request.prompt_ids), self._wait)

        def begin() -> None:
            task = self._tasks[generation] = self._loop.create_task(self._answer(generation, request, body, told))
            task.add_done_callback(end)

        def end(task: asyncio.Task[_End]) -> None:
            del self._tasks[generation]
            generation.end(*(("stopped", None) if task.cancelled() else task.result()))
            self._tell(told)

        self._loop.call_soon_threadsafe(begin)
        return generation

    def _wait(self, generation: Generation) -> None:
        with self._news:
            self._news.wait_for(lambda: generation.has_news or generation.is_cancelled, timeout=_WATCH_SECONDS)

    def _body(self, request: Request) -> dict[str, object]:
        sampling, limit = request.sampling, self._max_positions
        room = sampling.max_new_tokens if limit is None else limit - len(request.prompt_ids)
        body: dict[str, object] = {
            "model": self._model(request.members), "prompt": list(request.prompt_ids), "stream": True,
            "max_tokens": min(sampling.max_new_tokens, room), "temperature": sampling.temperature,
            "top_p": sampling.top_p, "seed": sampling.seed, "ignore_eos": True, "return_token_ids": True,
            "stop_token_ids": list(sampling.stop_token_ids), "skip_special_tokens": False,
        }  # fmt: skip
        if sampling.logit_bias:
            body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
        if request.num_logprobs is not None:
            body |= {"logprobs": request.num_logprobs, "return_tokens_as_token_ids": True}
        if request.grammar is not None and request.grammar.starts_after:
            raise LmtuneError("an answer in a form after reasoning; vLLM keeps to forms from the first token only; use "
                              "--engine lmtune")  # fmt: skip
        if request.grammar is not None:
            body["structured_outputs"] = {"grammar": request.grammar.text}
        return body

    async def _answer(
        self, generation: Generation, request: Request, body: Mapping[str, object], told: Callable[[], None]
    ) -> _End:
        """Hand the tokens on as they come; returns how the answer has ended."""
        reason: FinishReason = "stopped"
        try:
            async with self._stream.stream("POST", "/completions", json=body) as answer:
                if answer.status_code != 200:
                    raise _refusal(await answer.aread())
                async for line in answer.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    tree = json.loads(line.removeprefix("data: "))
                    if "error" in tree:
                        raise _refusal(line.removeprefix("data: ").encode())
                    for choice in tree["choices"]:
                        reason = _add(generation, request, choice) or reason
                    if generation.has_news:
                        self._tell(told)
        except LmtuneError as error:
            return "stopped", error
        except httpx.HTTPError as error:
            return "stopped", UnavailableError(f"vLLM does not answer: {one_line(error)}")
        is_cut = reason == "length" and body["max_tokens"] != request.sampling.max_new_tokens
        return ("context" if is_cut else reason), None

    def _tell(self, told: Callable[[], None]) -> None:
        with self._news:
            self._news.notify_all()
        told()


class VllmBackground(Generic[Waiter]):
    """A `Background`."""

    def __init__(
        self, begin: Callable[[Request, Callable[[], None]], Generation], tell: Callable[[Sequence[Waiter]], None]
    ) -> None:
        self._begin, self._tell, self._is_closed = begin, tell, False
        self._under_way = set[Generation]()

    def submit(self, request: Request, waiter: Waiter) -> Generation:
        """See `Background`."""
        self._under_way = {one for one in self._under_way if not one.is_over}
        generation = self._begin(request, lambda: self._tell([waiter]))
        self._under_way.add(generation)
        return generation

    def close(self) -> None:
        """See `Background`."""
        for generation in self._under_way:
            generation.cancel()


def _add(generation: Generation, request: Request, choice: Tree) -> FinishReason | None:
    """Give an answer the tokens of a chunk; why it has ended, if it has."""
    generation.num_read = generation.num_prompt_tokens
    tokens, stops = [int(token) for token in choice.get("token_ids") or ()], request.sampling.stop_token_ids
    has_stopped = bool(tokens) and tokens[-1] in stops
    if request.num_logprobs is not None and tokens:
        held = choice["logprobs"]
        for token, logprob, tops in zip(tokens, held["token_logprobs"], held["top_logprobs"], strict=True):
            ranked = sorted(((int(name.removeprefix(_NUMBERED)), value) for name, value in tops.items()),
                            key=lambda item: -item[1])  # fmt: skip
            if token not in stops:
                generation.logprobs.append(TokenLogprobs(token, logprob, tuple(ranked[: request.num_logprobs])))
    for token in tokens[:-1] if has_stopped else tokens:
        generation.add(token)
    if choice.get("finish_reason") is None:
        return None
    return "stop" if has_stopped or choice["finish_reason"] == "stop" else "length"


def _refusal(body: bytes) -> LmtuneError:
    """What vLLM says of a request that it does not answer."""
    try:
        said = json.loads(body)
        said = said.get("error", said)
        message = said["message"] if isinstance(said, dict) and "message" in said else str(said)
    except (ValueError, AttributeError):
        message = body.decode("utf-8", "replace")
    return LmtuneError(f"vLLM: {' '.join(str(message).split())[:500]}")
