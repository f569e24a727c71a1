"""What a model behind an endpoint says of a prompt: tokens, log-probabilities, the end, in one form for all servers.

    served = Served(endpoint, "support")
    said = served.complete([1, 5, 9], max_tokens=8)
    said.text, said.tokens, said.tops, said.finish_reason

Servers write log-probabilities in several ways, all read here: `logprobs` of completions (`tokens`, `token_logprobs`,
`top_logprobs`) and of chats (`content`), vLLM's `prompt_logprobs` by token id, llama.cpp's `completion_probabilities`.
What is absent, null or no number is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

from lmtune.data.types import Message
from lmtune.io.endpoint import Endpoint
from lmtune.io.text import is_finite_number

Token = int | str  # by its number, or by its text where the server gives no number
Tops = Mapping[Token, float]  # log-probabilities of some tokens at one place

_NUM_TOPS = 5  # the most that completions of OpenAI give
_BY_NUMBER = "token_id:"  # vLLM's way to write a token without text


@dataclass(frozen=True)
class Said:
    """An answer.

    Attributes:
        text: of it, without reasoning that the server takes apart.
        finish_reason: `stop`, `length`, or what else the server says.
        tokens: of the answer; empty where the server names none.
        tops: for each of `tokens` the log-probabilities there, its own among them; empty without any.
        prompt_names: the tokens of the prompt as the server names them; empty where the prompt is not scored.
        prompt_tops: for each of them as `tops`; the first is empty.
        prompt_tokens: how many tokens the server has read.
    """

    text: str = ""
    finish_reason: str | None = None
    tokens: tuple[Token, ...] = ()
    tops: tuple[Tops, ...] = ()
    prompt_names: tuple[Token, ...] = ()
    prompt_tops: tuple[Tops, ...] = ()
    prompt_tokens: int | None = None


class Served:
    """A model of this name at an endpoint."""

    def __init__(self, endpoint: Endpoint, model: str) -> None:
        self.endpoint, self.model = endpoint, model

    def score(self, prompt: Sequence[int] | str, ids: Sequence[int]) -> Said:
        """A prompt that is the tokens `ids`, scored; without scores where the server gives none.

        Raises:
            RefusedError, FailingError: as of `Endpoint.post`.
        """
        sent = prompt if isinstance(prompt, str) else list(prompt)
        body = {
            "model": self.model,
            "prompt": sent,
            "max_tokens": 1,
            "echo": True,
            "logprobs": _NUM_TOPS,
            "temperature": 0,
        }
        return completion(self.endpoint.post("/completions", body), ids)

    def complete(self, prompt: Sequence[int] | str, max_tokens: int) -> Said:
        """What follows a prompt, greedily.

        Raises:
            RefusedError, FailingError: as of `Endpoint.post`.
        """
        sent = prompt if isinstance(prompt, str) else list(prompt)
        body = {"model": self.model, "prompt": sent, "max_tokens": max_tokens, "logprobs": _NUM_TOPS, "temperature": 0}
        return completion(self.endpoint.post("/completions", body))

    def chat(self, messages: Sequence[Message], max_tokens: int) -> Said:
        """The next answer of a conversation, greedily.

        Raises:
            RefusedError, FailingError: as of `Endpoint.post`.
        """
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        body = {
            "model": self.model, "messages": turns, "max_tokens": max_tokens, "logprobs": True,
            "top_logprobs": _NUM_TOPS, "temperature": 0,
        }  # fmt: skip
        return chat(self.endpoint.post("/chat/completions", body))


def completion(tree: Mapping[str, Any], echoed: Sequence[int] | None = None) -> Said:
    """An answer of `/completions`; with `echoed` one that begins with these tokens of the prompt, scored."""
    choice, usage = _first_choice(tree), _usage(tree)
    tokens, tops = _places(choice, tree)
    if echoed is None:
        text = str(choice.get("text") or choice.get("content") or tree.get("content") or "")
        return Said(text, _reason(choice, tree), tokens, tops, prompt_tokens=usage)
    scored = _prompt_logprobs(choice, tree)
    if len(scored) == len(echoed):
        return Said(prompt_names=tuple(echoed), prompt_tops=scored, prompt_tokens=usage)
    count = len(echoed)
    if count <= len(tops) <= count + 1 and usage in (None, count):
        return Said(prompt_names=tokens[:count], prompt_tops=tops[:count], prompt_tokens=usage)
    return Said(prompt_tokens=usage)


def chat(tree: Mapping[str, Any]) -> Said:
    """An answer of `/chat/completions`."""
    choice = _first_choice(tree)
    message = choice.get("message")
    message = message if isinstance(message, dict) else {}
    tokens, tops = _places(choice, tree)
    return Said(str(message.get("content") or ""), _reason(choice, tree), tokens, tops, prompt_tokens=_usage(tree))


def has_logprobs(said: Said) -> bool:
    """Whether there are log-probabilities of use: not those of a temperature of 0, where all but one are impossible."""
    return any(tops and min(tops.values()) < -1e-6 and _spread(tops) for tops in said.tops)


def _spread(tops: Tops) -> bool:
    return len(tops) == 1 or sorted(tops.values())[-2] > -60


def _first_choice(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = tree.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else {}
    return first if isinstance(first, dict) else {}


def _reason(choice: Mapping[str, Any], tree: Mapping[str, Any]) -> str | None:
    if (said := choice.get("finish_reason")) is not None:
        return str(said)
    kind = tree.get("stop_type")  # llama.cpp's own
    return {"eos": "stop", "word": "stop", "limit": "length"}.get(str(kind))


def _usage(tree: Mapping[str, Any]) -> int | None:
    usage = tree.get("usage")
    count: Any = usage.get("prompt_tokens") if isinstance(usage, dict) else tree.get("tokens_evaluated")
    return int(count) if is_finite_number(count, integer=True) else None


def _places(choice: Mapping[str, Any], tree: Mapping[str, Any]) -> tuple[tuple[Token, ...], tuple[Tops, ...]]:
    """Tokens and log-probabilities, from whichever form there is."""
    held = choice.get("logprobs")
    held = held if isinstance(held, dict) else {}
    for listed in (held.get("content"), choice.get("completion_probabilities"), tree.get("completion_probabilities")):
        if isinstance(listed, list):
            return _by_place(listed)
    tokens, values = held.get("tokens"), held.get("token_logprobs")
    if not isinstance(tokens, list) or not isinstance(values, list) or len(tokens) != len(values):
        return (), ()
    others = held.get("top_logprobs")
    others = others if isinstance(others, list) and len(others) == len(tokens) else [None] * len(tokens)
    named = tuple(_token(token) for token in tokens)
    tops = tuple(
        _numbers(
            {**{_token(key): one for key, one in (other.items() if isinstance(other, dict) else ())}, token: value}
        )
        for token, value, other in zip(named, values, others, strict=True)
    )
    return named, tops if any(tops) else ()


def _by_place(listed: list[Any]) -> tuple[tuple[Token, ...], tuple[Tops, ...]]:
    """A list with an object for each token: OpenAI's chats, and llama.cpp of now and of 2024."""
    tokens, tops = list[Token](), list[Tops]()
    for one in listed:
        if not isinstance(one, dict):
            break
        token = _named(one)
        listed_here = (one.get(key) for key in ("top_logprobs", "top_probs", "probs"))
        others: list[Any] = next((each for each in listed_here if isinstance(each, list)), [])
        found = {_named(other): _logprob(other) for other in others if isinstance(other, dict)}
        if (own := _logprob(one)) is not None:
            found[token] = own
        tokens.append(token)
        tops.append(_numbers(found))
    return tuple(tokens), tuple(tops) if any(tops) else ()


def _prompt_logprobs(choice: Mapping[str, Any], tree: Mapping[str, Any]) -> tuple[Tops, ...]:
    """vLLM's, by token id: `[null, {"42": {"logprob": -0.1, "rank": 1, "decoded_token": " a"}}, …]`."""
    listed = choice.get("prompt_logprobs") or tree.get("prompt_logprobs")
    if not isinstance(listed, list):
        return ()
    places = [one if isinstance(one, dict) else {} for one in listed]
    return tuple(
        _numbers({int(key): _logprob(value) for key, value in one.items() if str(key).isdigit()}) for one in places
    )


def _named(one: Mapping[str, Any]) -> Token:
    if is_finite_number(one.get("id"), integer=True):
        return int(one["id"])
    return _token(one.get("token", one.get("tok_str", one.get("content", ""))))


def _token(said: object) -> Token:
    text = str(said)
    number = text.removeprefix(_BY_NUMBER)
    return int(number) if number != text and number.isdigit() else text


def _logprob(one: object) -> object:
    if not isinstance(one, dict):
        return one
    if "logprob" in one or "prob" not in one:
        return one.get("logprob")
    return log(max(one["prob"], 1e-30)) if is_finite_number(one["prob"]) else None


def _numbers(found: Mapping[Token, object]) -> Tops:
    """Those that are log-probabilities."""
    return {token: float(value) for token, value in found.items() if is_finite_number(value) and value <= 1e-3}  # type: ignore[arg-type,operator]
