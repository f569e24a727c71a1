"""The engine: token ids in, token ids out. It knows no tokenizer, no text and no conversation (an idea of nanochat's).

    engine = TransformersEngine(model)
    for token in engine.submit(Request(prompt_ids, Sampling(temperature=0.7, stop_token_ids=(2,)))):
        ...
    answers = engine.generate([Request(ids, sampling, Members((name,))) for ids, name in asked])

A request says the prompt, how its answer is sampled, and who answers: an adapter of several on one base, or all of them
together. `submit` streams the answer to one, one forward pass at a time under a lock, so that requests take turns token
by token. A `PromptCache` makes the next prompt cheap where it begins alike. `generate` answers many in batches, in
which each row has its own adapter. Neither uses a model's own generation settings.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from lmtune.errors import ConfigError, LmtuneError
from lmtune.io.text import format_list, is_finite_number
from lmtune.kernels.attention import NAME as PACKED_ATTENTION
from lmtune.models.members import AS_IS, BASE, Members
from lmtune.models.structure import base_of, max_positions

if TYPE_CHECKING:
    from transformers import Cache

_PREFILL_TOKENS = 512  # in one forward pass, so that a long prompt can be stopped and lets other prompts in

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

    Raises:
        ConfigError: naming every value that is out of bounds.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()

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


@dataclass(frozen=True)
class Request:
    """One prompt to answer.

    Attributes:
        prompt_ids: token ids, at least one.
        sampling: how tokens are chosen, and what ends the answer.
        members: who answers.
    """

    prompt_ids: Sequence[int]
    sampling: Sampling = Sampling()
    members: Members = AS_IS

    @property
    def num_rows(self) -> int:
        """How many rows of a batch it takes: one for each member."""
        return max(1, len(self.members.adapters))


class Generation(Iterator[int]):
    """The answer to one prompt, token by token; stop tokens are not given out.

    Attributes:
        num_prompt_tokens: of the prompt.
        num_read: how many of them are in the cache by now.
        finish_reason: `stop` at a stop token, `length` at `max_new_tokens`, `context` where the model reads no
            further, `stopped` by `cancel` or `close`; None while it goes on.
    """

    def __init__(self, num_prompt_tokens: int, decode: Callable[[Generation], Iterator[int]]) -> None:
        self.num_prompt_tokens, self.num_read = num_prompt_tokens, 0
        self.finish_reason: FinishReason | None = None
        self.is_cancelled = False
        self._tokens = decode(self)

    def __next__(self) -> int:
        return next(self._tokens)

    def cancel(self) -> None:
        """End it at its next token; may be called from any thread."""
        self.is_cancelled = True


class PromptCache:
    """What a model has read: token ids with their keys and values. It serves one generation at a time.

    Attributes:
        token_ids: the tokens that the cache holds.
        is_whole: False while a forward pass is at work; one that is interrupted leaves half a cache, to be thrown away.
    """

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.is_whole = True
        self.key_values: Cache | None = None
        self.prompt: tuple[list[int], torch.Tensor] | None = None  # the last one, and its logits[V]

    def crop(self, length: int) -> bool:
        """Keep the first `length` tokens. False: this kind of cache cannot be cropped, and it is empty now."""
        extra = len(self.token_ids) - length
        if extra == 0:
            return True
        if self.key_values is not None and extra > 0 and getattr(self.key_values, "is_croppable", False):
            # A sliding window that has moved on no longer holds what it should go back to, and raises.
            with contextlib.suppress(RuntimeError):
                self.key_values.crop(-extra)
                if self.key_values.get_seq_length() == length:
                    self.token_ids = self.token_ids[:length]
                    return True
        self.key_values, self.token_ids = None, []
        return False


class Engine(Protocol):
    """What generates tokens: the model of this process, or whatever else serves one."""

    @property
    def max_positions(self) -> int | None:
        """The longest prompt with its answer, in tokens; None without a limit."""

    def submit(self, request: Request, cache: PromptCache | None = None) -> Generation:
        """Stream the answer to a request whose prompt is shorter than `max_positions`.

        Args:
            request: who answers what.
            cache: what an earlier prompt to the same members has left; it is filled for the next one.

        Raises:
            LmtuneError: from the iterator, where the logits are not finite.
        """

    def generate(self, requests: Sequence[Request], advance: Callable[[int], None] | None = None) -> list[list[int]]:
        """Answer many requests in batches.

        Args:
            requests: in any order; each with its own members and sampling.
            advance: is called with the number of answers after each batch.

        Returns:
            The new tokens of each, in the order of the requests, without the stop token.

        Raises:
            LmtuneError: a prompt leaves no room for an answer.
        """


class TransformersEngine:
    """An `Engine` over a transformers model, or a PEFT model over one.

    Args:
        model: in evaluation mode.
        lock: held during a forward pass; PEFT tells its layers by hooks which adapter to use.
        batch_tokens: prompts and answers of one batch hold at most so many tokens, padding included.
    """

    def __init__(
        self, model: torch.nn.Module, lock: contextlib.AbstractContextManager[object] | None = None,
        batch_tokens: int = 16_384,
    ) -> None:  # fmt: skip
        self._model: Any = model
        self._lock, self._batch_tokens = lock or threading.RLock(), batch_tokens
        # whole modules beside the adapter, of which PEFT can switch some kinds only by `disable_adapter`
        self._trains_modules = any(hasattr(module, "original_module") for module in model.modules())
        self._keeps_logits = "logits_to_keep" in inspect.signature(base_of(model).forward).parameters

    @property
    def max_positions(self) -> int | None:
        """See `Engine`."""
        return max_positions(self._model)

    def submit(self, request: Request, cache: PromptCache | None = None) -> Generation:
        """See `Engine`."""
        read = cache or PromptCache()
        return Generation(len(request.prompt_ids), lambda generation: self._decode(request, read, generation))

    def generate(self, requests: Sequence[Request], advance: Callable[[int], None] | None = None) -> list[list[int]]:
        """See `Engine`. Equal to `submit` for each request, to rounding."""
        limit = self.max_positions
        for index, request in enumerate(requests):
            if limit is not None and (length := len(request.prompt_ids)) >= limit:
                raise LmtuneError(f"prompt {index}: {length} tokens; expected fewer than the model reads, {limit}")
        answers: list[list[int]] = [[] for _ in requests]
        by_length = sorted(range(len(requests)), key=lambda index: len(requests[index].prompt_ids), reverse=True)
        while by_length:
            longest = len(requests[by_length[0]].prompt_ids)
            room = max(requests[index].sampling.max_new_tokens for index in by_length)
            room = room if limit is None else min(room, limit - longest)
            rows = itertools.accumulate(requests[index].num_rows for index in by_length)
            count = max(1, sum(row * (longest + room) <= self._batch_tokens for row in rows))
            batch, by_length = by_length[:count], by_length[count:]
            generated = _generate_batch(self._model, [requests[index] for index in batch], room)
            for index, new in zip(batch, generated, strict=True):
                sampling = requests[index].sampling
                new = new[: sampling.max_new_tokens]
                end = next((place for place, token in enumerate(new) if token in sampling.stop_token_ids), len(new))
                answers[index] = new[:end]
            if advance is not None:
                advance(len(batch))
        return answers

    def _decode(self, request: Request, cache: PromptCache, generation: Generation) -> Iterator[int]:
        prompt, sampling = list(request.prompt_ids), request.sampling
        sampler = Sampler(sampling)
        try:
            for logits in self._prefill(prompt, request.members, cache):  # noqa: B007 - the last is used below
                generation.num_read = len(cache.token_ids)
                if generation.is_cancelled:
                    return
            limit = self.max_positions
            room = sampling.max_new_tokens if limit is None else min(sampling.max_new_tokens, limit - len(prompt))
            for left in range(room, 0, -1):
                token = sampler(logits)
                if generation.is_cancelled:
                    return
                if token in sampling.stop_token_ids:
                    generation.finish_reason = "stop"
                    return
                yield token
                if left > 1:
                    logits = self._read([token], request.members, cache)
            generation.finish_reason = "context" if limit is not None and room == limit - len(prompt) else "length"
        finally:
            generation.finish_reason = generation.finish_reason or "stopped"

    def _prefill(self, prompt: list[int], members: Members, cache: PromptCache) -> Iterator[torch.Tensor]:
        """Read the part of `prompt` that is not in the cache, piece by piece; yields logits[V] after each piece.

        The same prompt again, as another try has it, takes the logits of the first time, so that an equal seed gives
        an equal answer to the last bit.
        """
        before, cache.prompt = cache.prompt, None
        if before is not None and before[0] == prompt and cache.crop(len(prompt)):
            cache.prompt = before
            yield before[1]
            return
        pairs = zip(cache.token_ids, prompt[:-1], strict=False)
        shared = next((n for n, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
        cache.crop(min(len(cache.token_ids), len(prompt) - 1) if shared is None else shared)
        rest = prompt[len(cache.token_ids) :]
        for start in range(0, len(rest), _PREFILL_TOKENS):
            logits = self._read(rest[start : start + _PREFILL_TOKENS], members, cache)
            if start + _PREFILL_TOKENS >= len(rest):
                cache.prompt = prompt, logits
            yield logits

    def _read(self, token_ids: list[int], members: Members, cache: PromptCache) -> torch.Tensor:
        """Read further tokens; returns fp32 logits[V] after the last.

        Raises:
            LmtuneError: the logits are not finite.
        """
        after = [*cache.token_ids, *token_ids]
        # A model that hands back no cache reads everything again at each token.
        rows = [after if cache.key_values is None else token_ids] * max(1, len(members.adapters))
        input_ids = torch.tensor(rows, device=self._model.device)
        arguments: dict[str, Any] = {"logits_to_keep": 1} if self._keeps_logits else {}
        switch: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self._trains_modules and members.adapters == (BASE,):
            switch = self._model.disable_adapter()
        elif members.adapters:  # faster than `disable_adapter`, which looks through the whole model at each switch
            arguments["adapter_names"] = list(members.adapters)
        cache.is_whole = False
        with self._lock, torch.no_grad(), switch, unpacked_attention(self._model):
            output = self._model(input_ids=input_ids, past_key_values=cache.key_values, use_cache=True, **arguments)
        cache.key_values, cache.token_ids = getattr(output, "past_key_values", None), after
        cache.is_whole = True
        logits = members.next_token(output.logits[:, -1].float())
        if not torch.isfinite(logits.max()):
            raise LmtuneError("logits: NaN or infinity; expected finite numbers; the weights or adapter are damaged")
        return logits


class Sampler:
    """Chooses tokens with transformers' own warpers and a random generator that no other answer shares."""

    def __init__(self, sampling: Sampling) -> None:
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

        self._greedy, self._seed = sampling.temperature == 0, sampling.seed
        self._generator: torch.Generator | None = None
        self._warp = LogitsProcessorList()
        if not self._greedy:
            self._warp.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_p < 1:
            self._warp.append(TopPLogitsWarper(float(sampling.top_p)))

    def __call__(self, logits: torch.Tensor) -> int:
        """The next token after logits[V]."""
        if self._greedy:
            return int(logits.argmax())
        if self._generator is None:
            self._generator = torch.Generator(logits.device).manual_seed(self._seed)
        # Less its maximum the scores overflow at no temperature, and the distribution is the same.
        scores = self._warp(None, (logits - logits.max())[None])
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))


def _generate_batch(model: Any, requests: Sequence[Request], max_new_tokens: int) -> list[list[int]]:
    """One batch through `model.generate`, padded on the left; what follows each prompt, and what is after its end."""
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    plain = all(request.sampling.temperature == 0 and not request.members.is_ensemble for request in requests)
    of_rows = [request for request in requests for _ in range(request.num_rows)]
    width = max(len(request.prompt_ids) for request in requests)
    pad = next((token for request in requests for token in request.sampling.stop_token_ids), 0)  # masked: any serves
    missing = [width - len(request.prompt_ids) for request in of_rows]
    rows = [[pad] * less + list(request.prompt_ids) for less, request in zip(missing, of_rows, strict=True)]
    input_ids = torch.tensor(rows, device=model.device)
    mask = (torch.arange(width) >= torch.tensor(missing)[:, None]).long().to(model.device)
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, pad_token_id=pad, use_cache=True
    )
    arguments: dict[str, Any] = {}
    if any(request.members.adapters for request in requests):
        active = getattr(model, "active_adapter", BASE)
        arguments["adapter_names"] = [name for one in requests for name in one.members.adapters or (active,)]
    with torch.no_grad(), unpacked_attention(model), _no_generation_config(model):
        output = model.generate(
            input_ids=input_ids, attention_mask=mask, generation_config=config,
            logits_processor=LogitsProcessorList([] if plain else [_Chooser(requests)]),
            stopping_criteria=StoppingCriteriaList([_Ends(of_rows, width)]), **arguments,
        )  # fmt: skip
    starts = itertools.accumulate((request.num_rows for request in requests), initial=0)
    new: list[list[int]] = output[:, width:].tolist()
    return [new[start] for start, _ in zip(starts, requests, strict=False)]


class _Chooser:
    """A logits processor that leaves each row the one token that its request takes, of all its members."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = [(request, Sampler(request.sampling)) for request in requests]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        parts = torch.split(scores, [request.num_rows for request, _ in self._requests])
        tokens = [
            sampler(request.members.next_token(part))
            for (request, sampler), part in zip(self._requests, parts, strict=True)
        ]
        counts = torch.tensor([len(part) for part in parts])
        chosen = torch.tensor(tokens).repeat_interleave(counts).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


class _Ends:
    """A stopping criterion that ends each row at a stop token of its request, or at its limit."""

    def __init__(self, of_rows: Sequence[Request], width: int) -> None:
        most = max(len(request.sampling.stop_token_ids) for request in of_rows)
        stops = [[*request.sampling.stop_token_ids, *[-1] * most][:most] for request in of_rows]
        self._stops = torch.tensor(stops).view(len(of_rows), most)
        self._limits = width + torch.tensor([request.sampling.max_new_tokens for request in of_rows])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self._stops, self._limits = self._stops.to(input_ids.device), self._limits.to(input_ids.device)
        return (input_ids[:, -1:] == self._stops).any(1) | (input_ids.shape[1] >= self._limits)


@contextlib.contextmanager
def unpacked_attention(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block the model's attention knows KV caches and padding, whatever training has switched to."""
    base = base_of(model)
    before = base.config._attn_implementation
    if before != PACKED_ATTENTION:
        yield
        return
    base.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        base.set_attn_implementation(before)


@contextlib.contextmanager
def _no_generation_config(model: Any) -> Iterator[None]:
    """Inside the block the model brings no generation settings of its own, which transformers uses where a call leaves
    something open; a batch would answer otherwise than a chat."""
    from transformers import GenerationConfig

    parts = [model] if base_of(model) is model else [model, base_of(model)]  # a PEFT model hands its own to its base
    before = [part.generation_config for part in parts]
    try:
        for part in parts:
            part.generation_config = GenerationConfig()
        yield
    finally:
        for part, config in zip(parts, before, strict=True):
            part.generation_config = config
