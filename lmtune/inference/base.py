"""The seam between those who ask and what generates: token ids in, token ids out.

for token in engine.submit(Request(prompt_ids, Sampling(stop_token_ids=(2,)))): …      # whoever can wait
background = engine.background(tell)                                                    # whoever cannot
generation = background.submit(request, waiter)     # `tell` gets `waiter` when `generation` has news
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from lmtune.inference.request import Generation, Request, TokenLogprobs
from lmtune.models.members import AS_IS, Members

Waiter = TypeVar("Waiter")
_Waiter = TypeVar("_Waiter", contravariant=True)


class Background(Protocol[_Waiter]):
    """An engine that runs by itself, for a server, whose event loop may not wait."""

    def submit(self, request: Request, waiter: _Waiter) -> Generation:
        """Answer a request; as of `Engine.submit`. Ask the answer for tokens only while it `has_news`."""

    def close(self) -> None:
        """Answer no more; answers under way are cancelled."""


class Engine(Protocol):
    """What generates tokens: the model of this process, or whatever else serves one.

    Attributes:
        lock: held by whoever needs the engine's tokenizers, adapters or model for itself.
    """

    lock: contextlib.AbstractContextManager[bool]

    @property
    def max_positions(self) -> int | None:
        """The longest prompt with its answer, in tokens; None without a limit."""

    @property
    def vocab_size(self) -> int:
        """V of the logits."""

    @property
    def description(self) -> str:
        """What runs where, for people: `134.5 million parameters on the CPU`."""

    def submit(self, request: Request) -> Generation:
        """Stream the answer to a request whose prompt is shorter than `max_positions`.

        Raises:
            LmtuneError: from the iterator, where the logits are not finite.
        """

    def generate(self, requests: Sequence[Request], advance: Callable[[int], None] | None = None) -> list[list[int]]:
        """Answer many requests.

        Args:
            requests: in any order; each with its own members and sampling.
            advance: is called with a number of answers that are there.

        Returns:
            The new tokens of each, in the order of the requests, without the stop token.

        Raises:
            LmtuneError: a prompt leaves no room for an answer.
        """

    def score(self, token_ids: Sequence[int], members: Members = AS_IS, num_top: int = 0) -> list[TokenLogprobs]:
        """How probable each token is after those before it.

        Args:
            token_ids: `[T]`, at most `max_positions` of them.
            members: who reads.
            num_top: how many of the most probable tokens are told at each place.

        Returns:
            `[T - 1]`: of all but the first.
        """

    def background(self, tell: Callable[[Sequence[Waiter]], None]) -> Background[Waiter]:
        """Have it run by itself.

        Args:
            tell: is called, from any thread, with those whose answer has news or is over.
        """
