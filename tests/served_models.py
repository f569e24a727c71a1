"""Servers for tests: a small HTTP server over a model in this process, as right or wrong as it is told to be."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from tests.json_server import json_server

Logits = Callable[[Sequence[int]], torch.Tensor]  # token ids to logits [T, V]
Style = Literal["openai", "vllm", "llama.cpp"]


@dataclass
class Serving:
    """What a server does.

    Attributes:
        logits: of the model.
        tokenizer: with the chat template that the server uses.
        stops: token ids that end an answer.
        style: whose form answers have.
        ways: `echo`, `completions`, `chat`, `logprobs` (of answers).
        takes_tokens: whether a prompt may be tokens.
        before: token ids that the server puts before every prompt that is text or a conversation.
        drops_system: whether it leaves system turns out.
        counts: whether it tells how many tokens a prompt has.
        names: of its models.
        parents: of those that are adapters, what they are over.
        key: that it wants.
        body: what it answers to everything: status and bytes.
    """

    logits: Logits
    tokenizer: Any
    stops: tuple[int, ...]
    style: Style = "openai"
    ways: tuple[str, ...] = ("echo", "completions", "chat", "logprobs")
    takes_tokens: bool = True
    before: tuple[int, ...] = ()
    drops_system: bool = False
    counts: bool = True
    names: tuple[str, ...] = ("trial",)
    parents: dict[str, str] = field(default_factory=dict)
    key: str | None = None
    body: tuple[int, bytes] | None = None
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and tree, or bytes."""
        if self.body is not None:
            return self.body
        if path.endswith("/models"):
            return 200, {"data": [{"id": name, "parent": self.parents.get(name)} for name in self.names]}
        if body.get("model") not in self.names:
            return 404, {"error": {"message": f"The model `{body.get('model')}` does not exist.", "code": 404}}
        if path.endswith("/chat/completions") and "chat" in self.ways:
            return 200, self._chat(body)
        if path.endswith("/completions") and {"completions", "echo"} & set(self.ways) and "messages" not in body:
            if isinstance(body["prompt"], list) and not self.takes_tokens:
                return 400, {"error": "prompt must be a string"}
            if body.get("echo") and "echo" not in self.ways:
                return 400, {"error": "Only no echo is supported"}
            return 200, self._completion(body)
        return 404, {"detail": "Not Found"}

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        ids = list(prompt) if isinstance(prompt, list) else [*self.before, *self.tokenizer.encode(prompt)]
        new, reason = self._greedy(ids, body["max_tokens"])
        text, usage = self._decode(new), {"prompt_tokens": len(ids)} if self.counts else None
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": reason}
        whole, start = ([*ids, *new], 0) if body.get("echo") else ([*ids, *new], len(ids))
        places = self._places(whole, start, body["logprobs"]) if self._gives(body) else None
        if self.style == "llama.cpp":
            choice["logprobs"] = None if places is None else {"content": [self._object(*place) for place in places]}
        else:
            choice["logprobs"] = None if places is None else self._columns(places)
        if self.style == "vllm" and body.get("echo"):
            choice["prompt_logprobs"] = [
                None if not tops else {str(t): {"logprob": v, "rank": 1, "decoded_token": self._piece(t)}
                                       for t, v in {**tops, token: own}.items()}
                for token, own, tops in self._places(ids, 0, body["logprobs"])
            ]  # fmt: skip
        return {"object": "text_completion", "choices": [choice], "usage": usage}

    def _chat(self, body: dict[str, Any]) -> dict[str, Any]:
        turns = [one for one in body["messages"] if one["role"] != "system" or not self.drops_system]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = [*self.before, *self.tokenizer.encode(text, add_special_tokens=False)]
        new, reason = self._greedy(ids, body["max_tokens"])
        choice: dict[str, Any] = {
            "message": {"role": "assistant", "content": self._decode(new)}, "finish_reason": reason, "logprobs": None,
        }  # fmt: skip
        if "logprobs" in self.ways:
            places = self._places([*ids, *new], len(ids), body["top_logprobs"])
            choice["logprobs"] = {"content": [self._object(*place) for place in places]}
        usage = {"prompt_tokens": len(ids)} if self.counts else None
        return {"object": "chat.completion", "choices": [choice], "usage": usage}

    def _gives(self, body: dict[str, Any]) -> bool:
        return bool(body.get("echo")) or "logprobs" in self.ways

    def _greedy(self, ids: Sequence[int], most: int) -> tuple[list[int], str]:
        new: list[int] = []
        while len(new) < most:
            token = int(self.logits([*ids, *new])[-1].argmax())
            if token in self.stops:
                return new, "stop"
            new.append(token)
        return new, "length"

    def _places(self, ids: Sequence[int], start: int, count: int) -> list[tuple[int, float | None, dict[int, float]]]:
        """(token, its log-probability, the `count` highest) of each token from `start` on."""
        logs = self.logits(ids).double().log_softmax(-1)
        found = list[tuple[int, float | None, dict[int, float]]]()
        for place in range(start, len(ids)):
            if place == 0:
                found.append((ids[0], None, {}))
                continue
            top = logs[place - 1].topk(count)
            tops = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            found.append((ids[place], float(logs[place - 1, ids[place]]), tops))
        return found

    def _columns(self, places: Sequence[tuple[int, float | None, dict[int, float]]]) -> dict[str, Any]:
        return {
            "tokens": [self._piece(token) for token, _, _ in places],
            "token_logprobs": [own for _, own, _ in places],
            "top_logprobs": [{self._piece(t): v for t, v in tops.items()} or None for _, _, tops in places],
            "text_offset": [0] * len(places),
        }  # fmt: skip

    def _object(self, token: int, own: float | None, tops: dict[int, float]) -> dict[str, Any]:
        def one(token: int, value: float | None) -> dict[str, Any]:
            piece = self._piece(token)
            number = {"id": token} if self.style == "llama.cpp" else {}
            return {**number, "token": piece, "bytes": list(piece.encode()), "logprob": value}

        return {**one(token, own), "top_logprobs": [one(t, v) for t, v in tops.items()]}

    def _piece(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


@contextlib.contextmanager
def served(serving: Serving) -> Iterator[str]:
    """The address of a server that does so, for as long as the block lasts."""
    lock = threading.Lock()

    def answer(path: str, body: dict[str, Any] | None, key: str | None) -> tuple[int, Any]:
        with lock:
            serving.requests.append((path, body or {}))
            serving.keys.append(key)
            if serving.key is not None and key != f"Bearer {serving.key}":
                return 401, {"error": f"no such key: {key}"}
            return serving.answer(path, body or {})

    with json_server(answer) as url:
        yield url
