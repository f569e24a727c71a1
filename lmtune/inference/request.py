"""What is asked of an engine, token ids in, and the answer that it streams, token ids out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch

from lmtune.errors import ConfigError
from lmtune.io.text import format_list, is_finite_number
from lmtune.models.members import AS_IS, Members

_LEAST_TEMPERATURE = 1e-30  # less is 0 in fp32, by which nothing can be divided
FinishReason = Literal["stop", "length", "context", "stopped"]


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen, and where it ends.

    Attributes:
        temperature: 0 is greedy; 1 is the model's own distribution.
        top_p: nucleus sampling threshold: sample only among the most probable tokens that together have this
            probability; 1 is all.
        max_new_tokens: where an answer that does not stop is cut.
        seed: equal seeds give equal answers.
        stop_token_ids: each ends the answer and is not part of it.
        logit_bias: (token, what is added to its logit), before temperature; -100 rules a token out.

    Raises:
        ConfigError: naming every value that is out of bounds.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        number, integer = is_finite_number, partial(is_finite_number, integer=True)
        fits = {
            ("temperature", "a number, 0 or more"): number(self.temperature) and self.temperature >= 0,
            ("top_p", "a number above 0 and at most 1"): number(self.top_p) and 0 < self.top_p <= 1,
            ("max_new_tokens", "an integer, 1 or more"): integer(self.max_new_tokens) and self.max_new_tokens >= 1,
            ("seed", f"an integer from 0 to {2**32 - 1}"): integer(self.seed) and 0 <= self.seed < 2**32,
        }
        wrong = [f"{name}: {getattr(self, name)!r}; expected {what}" for (name, what), is_right in fits.items()
                 if not is_right]  # fmt: skip
        if wrong:
            raise ConfigError(wrong[0] if len(wrong) == 1 else f"{len(wrong)} options are wrong\n{format_list(wrong)}")


class Constraint(Protocol):
    """What one answer may say, token by token."""

    def allowed(self) -> torch.Tensor | None:
        """Which tokens may come next, `bool[V]` on the CPU; None for all."""

    def advance(self, token: int) -> None:
        """A token has come."""


class Grammar(Protocol):
    """What answers may say.

    Attributes:
        text: of the grammar, as llguidance reads it, for an engine in another process.
        starts_after: what an answer says before it holds; empty where it holds from the first token.
    """

    text: str
    starts_after: str

    def constraint(self) -> Constraint:
        """For one answer."""


@dataclass(frozen=True)
class TokenLogprobs:
    """How probable a token was, before temperature, `top_p` and a constraint.

    Attributes:
        token: its id.
        logprob: in nats.
        top: the most probable tokens there with theirs, in this order.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Request:
    """One prompt to answer.

    Attributes:
        prompt_ids: token ids, at least one.
        sampling: how tokens are chosen, and what ends the answer.
        members: who answers.
        num_logprobs: how many of the most probable tokens `Generation.logprobs` names beside each; None for nothing.
        grammar: what the answer may say.
    """

    prompt_ids: Sequence[int]
    sampling: Sampling = Sampling()
    members: Members = AS_IS
    num_logprobs: int | None = None
    grammar: Grammar | None = None

    @property
    def num_rows(self) -> int:
        """How many rows of a batch it takes: one for each member."""
        return max(1, len(self.members.adapters))


class Generation(Iterator[int]):
    """The answer to one prompt, token by token; stop tokens are not given out. One that is let go of is cancelled.

    Attributes:
        num_prompt_tokens: of the prompt.
        num_read: how many of them are in the cache by now.
        logprobs: of each token so far, also of those that were given out, if the request asks for them.
        is_cancelled: whether it was.
    """

    def __init__(self, num_prompt_tokens: int, advance: Callable[[Generation], None]) -> None:
        """`advance` runs the engine until there is a further token, or the end."""
        self.num_prompt_tokens, self.num_read = num_prompt_tokens, 0
        self.logprobs: list[TokenLogprobs] = []
        self.is_cancelled = False
        self._advance = advance
        self._tokens: deque[int] = deque()
        self._reason: FinishReason | None = None
        self._error: BaseException | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        """`stop` at a stop token, `length` at `max_new_tokens`, `context` where the model reads no further, `stopped`
        by `cancel` or an error; None while tokens are to come."""
        if self.is_cancelled:
            return "stopped" if self._tokens or self._reason is None else self._reason
        return None if self._tokens else self._reason

    @property
    def has_news(self) -> bool:
        """Whether the next token, or the end, is there already."""
        return bool(self._tokens) or self._reason is not None

    @property
    def is_over(self) -> bool:
        """Whether no token will be added."""
        return self._reason is not None or self.is_cancelled

    def __next__(self) -> int:
        while True:
            if self.is_cancelled:
                self._reason = self.finish_reason
                self._tokens.clear()
                raise StopIteration
            if self._tokens:
                return self._tokens.popleft()
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self._reason is not None:
                raise StopIteration
            self._advance(self)

    def __del__(self) -> None:
        self.is_cancelled = True

    def cancel(self) -> None:
        """End it at its next token; may be called from any thread."""
        self.is_cancelled = True

    def add(self, token: int) -> None:
        """The engine's: a further token."""
        self._tokens.append(token)

    def end(self, reason: FinishReason, error: BaseException | None = None) -> None:
        """The engine's: there are no further tokens, because of an error or not."""
        self._error, self._reason = error, reason


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """How probable `tokens[N]` are after `logits[N, V]`, each beside the `num_top` most probable ones."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs[torch.arange(len(tokens)), torch.tensor(tokens, device=logits.device)].tolist()
    best = logprobs.topk(min(num_top, logits.shape[-1]), -1)
    return [
        TokenLogprobs(token, logprob, tuple(zip(ids, values, strict=True)))
        for token, logprob, ids, values in zip(tokens, chosen, best.indices.tolist(), best.values.tolist(), strict=True)
    ]


class Sampler:
    """Chooses tokens with transformers' own warpers and a random generator that no other answer shares."""

    def __init__(self, sampling: Sampling) -> None:
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

        self._greedy, self._seed = sampling.temperature == 0, sampling.seed
        self._generator: torch.Generator | None = None
        self._bias = sampling.logit_bias
        self._biased: tuple[torch.Tensor, torch.Tensor] | None = None  # tokens, and what is added to their logits
        self._warp = LogitsProcessorList()
        if not self._greedy:
            self._warp.append(TemperatureLogitsWarper(max(sampling.temperature, _LEAST_TEMPERATURE)))
        if sampling.top_p < 1:
            self._warp.append(TopPLogitsWarper(float(sampling.top_p)))

    def biased(self, logits: torch.Tensor) -> torch.Tensor:
        """`logits[V]` with `Sampling.logit_bias`."""
        if not self._bias:
            return logits
        if self._biased is None:
            tokens, added = zip(*self._bias, strict=True)
            bias = torch.tensor(added, dtype=logits.dtype, device=logits.device)
            self._biased = torch.tensor(tokens, device=logits.device), bias
        return logits.index_add(0, *self._biased)

    def __call__(self, logits: torch.Tensor) -> int:
        """The next token after logits[V]."""
        if self._greedy:
            return int(logits.argmax())
        if self._generator is None:
            self._generator = torch.Generator(logits.device).manual_seed(self._seed)
        # Less its maximum the scores overflow at no temperature, and the distribution is the same.
        scores = self._warp(None, (logits - logits.max())[None])
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
