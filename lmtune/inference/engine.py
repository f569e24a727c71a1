"""The engine: token ids in, token ids out. It knows no tokenizer, no text and no conversation (an idea of nanochat's).

    engine = TransformersEngine(model)
    for token in engine.submit(Request(prompt_ids, Sampling(temperature=0.7, stop_token_ids=(2,)))):
        ...
    answers = engine.generate([Request(ids, sampling, Members((name,))) for ids, name in asked])

Batching is continuous (Orca, https://www.usenix.org/conference/osdi22/presentation/yu): all requests under way share
each forward pass, whoever asked, whenever they came, whatever their adapter, sampling and length; a request enters when
its prompt is read and leaves at its end. There is no thread behind it: whoever waits for a token runs the next pass for
all. What was read stays for prompts that begin alike. No model's own generation settings are used.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lmtune.errors import LmtuneError
from lmtune.inference.background import BackgroundEngine
from lmtune.inference.base import Waiter
from lmtune.inference.kv_cache import copy_of, is_joinable, join, select, with_room
from lmtune.inference.prefixes import Prefix, PrefixStore
from lmtune.inference.request import Constraint, Generation, Request, Sampler, TokenLogprobs, token_logprobs
from lmtune.kernels.attention import NAME as PACKED_ATTENTION
from lmtune.models.members import AS_IS, BASE, Members
from lmtune.models.structure import base_of, max_positions

if TYPE_CHECKING:
    from transformers import Cache

_PREFILL_TOKENS = 512  # of prompts in one forward pass, so that a long one can be stopped and lets others in
_PREFIX_BYTES = 2**29


@dataclass(eq=False)
class _Row:
    """A request under way: a row of a batch, or of an ensemble one for each member.

    Attributes:
        token_ids: the prompt, then the answer.
        room: how many tokens the answer may have.
        constraint: what it may say.
        keeps: whether what it read is kept for later prompts.
        num_read: how many tokens are in the cache.
        logits: `[V]` after the prompt.
    """

    request: Request
    generation: Generation
    sampler: Sampler
    token_ids: list[int]
    room: int
    keeps: bool
    constraint: Constraint | None
    num_read: int = 0
    cache: Cache | None = None
    logits: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        return self.request.num_rows

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def needed(self) -> int:
        """How many columns it may come to need."""
        return self.num_prompt + self.room


@dataclass(eq=False)
class _Batch:
    """Rows that share a forward pass, with their cache of `length` columns.

    Attributes:
        without_adapter: the adapter is switched off for the pass.
    """

    rows: list[_Row]
    cache: Cache | None
    length: int
    without_adapter: bool

    @property
    def places(self) -> list[range]:
        """Which rows of the tensors are whose."""
        places, start = [], 0
        for row in self.rows:
            places.append(range(start, start + row.num_rows))
            start += row.num_rows
        return places


class TransformersEngine:
    """An `Engine` over a transformers model, or a PEFT model over one.

    Args:
        model: in evaluation mode.
        batch_tokens: prompts and answers of one batch hold at most so many tokens, padding included.
        prefix_bytes: how much of what was read is kept.

    Attributes:
        model: as given, or by `use`.
        lock: held during a forward pass; PEFT tells its layers by hooks which adapter to use.
    """

    def __init__(self, model: torch.nn.Module, batch_tokens: int = 32_768, prefix_bytes: int = _PREFIX_BYTES) -> None:
        self.use(model)
        self.lock: contextlib.AbstractContextManager[bool] = threading.RLock()
        self._batch_tokens = batch_tokens
        parameters = inspect.signature(base_of(model).forward).parameters
        self._keeps_logits, self._takes_positions = "logits_to_keep" in parameters, "position_ids" in parameters
        self._arrived: deque[_Row] = deque()  # from any thread
        self._waiting: deque[_Row] = deque()
        self._reading: list[_Row] = []
        self._batches: list[_Batch] = []
        self._prefixes = PrefixStore(prefix_bytes)
        self._joins: bool | None = None  # whether its cache is of a kind that rows can share; None: not seen yet

    @property
    def max_positions(self) -> int | None:
        """See `Engine`."""
        return max_positions(self.model)

    @property
    def vocab_size(self) -> int:
        """See `Engine`."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def description(self) -> str:
        """See `Engine`."""
        base = base_of(self.model)
        size = base.num_parameters()
        amount = f"{size / 1e9:.1f} billion" if size >= 1e9 else f"{size / 1e6:.1f} million"
        return f"{amount} parameters on the {'GPU' if base.device.type == 'cuda' else 'CPU'}"

    def use(self, model: torch.nn.Module) -> None:
        """Go on with the same model after adapters were put on it, with `lock` held."""
        self.model: Any = model
        self._has_adapters = hasattr(model, "peft_config")

    def submit(self, request: Request) -> Generation:
        """See `Engine`."""
        row = self._new_row(request, keeps=True)
        self._arrived.append(row)
        return row.generation

    def generate(self, requests: Sequence[Request], advance: Callable[[int], None] | None = None) -> list[list[int]]:
        """See `Engine`. Equal to `submit` for each request, to rounding."""
        limit = self.max_positions
        for index, request in enumerate(requests):
            if limit is not None and (length := len(request.prompt_ids)) >= limit:
                raise LmtuneError(f"prompt {index}: {length} tokens; expected fewer than the model reads, {limit}")
        rows = [self._new_row(request, keeps=False) for request in requests]
        self._arrived.extend(sorted(rows, key=lambda row: row.num_prompt, reverse=True))  # like beside like
        waiting = list(rows)
        try:
            while waiting:
                with self.lock:
                    self._step()
                ended = [row for row in waiting if row.generation.is_over]
                if ended and advance is not None:
                    advance(len(ended))
                waiting = [row for row in waiting if not row.generation.is_over]
            return [list(row.generation) for row in rows]
        finally:
            for row in waiting:
                row.generation.cancel()

    def _new_row(self, request: Request, keeps: bool) -> _Row:
        limit, prompt = self.max_positions, list(request.prompt_ids)
        most = request.sampling.max_new_tokens
        room = most if limit is None else min(most, limit - len(prompt))
        generation, sampler = Generation(len(prompt), self._advance), Sampler(request.sampling)
        constraint = None if request.grammar is None else request.grammar.constraint()
        return _Row(request, generation, sampler, prompt, room, keeps, constraint)

    @property
    def num_requests(self) -> int:
        """How many are under way or wait."""
        return (
            len(self._arrived) + len(self._waiting) + len(self._reading) + sum(len(one.rows) for one in self._batches)
        )

    def background(self, tell: Callable[[Sequence[Waiter]], None]) -> BackgroundEngine[Waiter]:
        """See `Engine`."""
        return BackgroundEngine(self, tell)

    def step(self) -> None:
        """Give every request under way a token, and read a piece of what waits; for whoever runs the engine for others.

        Errors are raised where the answers are waited for.
        """
        with self.lock:
            self._step()

    def score(self, token_ids: Sequence[int], members: Members = AS_IS, num_top: int = 0) -> list[TokenLogprobs]:
        """See `Engine`."""
        row = self._new_row(Request(token_ids, members=members), keeps=False)
        batch, last = _Batch([row], None, 0, self._is_switched_off(row)), len(token_ids) - 1
        found: list[TokenLogprobs] = []
        while (start := row.num_read) < last:
            end = min(last, start + _PREFILL_TOKENS)
            with self.lock:
                logits = self._forward(batch, [token_ids[:end]], end - start)
            row.num_read = end
            each = [members.next_token(logits[:, place]) for place in range(end - start)]
            found += token_logprobs(torch.stack(each), token_ids[start + 1 : end + 1], num_top)
        return found

    def _advance(self, generation: Generation) -> None:
        with self.lock:
            if not generation.has_news:
                self._step()

    # --- one pass over what generates, one over what is read

    def _step(self) -> None:
        while self._arrived:
            self._waiting.append(self._arrived.popleft())
        with self._ends_on_error([*self._waiting, *self._reading, *(row for one in self._batches for row in one.rows)]):
            self._drop_cancelled()  # both copy caches, for which there may be no memory
            self._admit()
        for batch in list(self._batches):
            with self._ends_on_error(batch.rows):
                self._decode(batch)
        if self._reading:
            rows = self._next_to_read()
            with self._ends_on_error(rows):
                self._read(rows)

    def _drop_cancelled(self) -> None:
        self._waiting = deque(row for row in self._waiting if not row.generation.is_cancelled)
        for row in [row for row in self._reading if row.generation.is_cancelled]:
            self._reading.remove(row)
            if row.keeps and row.cache is not None and is_joinable(row.cache):
                self._prefixes.add(row.request.members, Prefix(tuple(row.token_ids[: row.num_read]), row.cache))
        for batch in list(self._batches):
            self._leave(batch, [row for row in batch.rows if row.generation.is_cancelled])

    def _admit(self) -> None:
        """Let those in who have come first, as far as there is room; one is always let in."""
        inside = [*self._reading, *(row for batch in self._batches for row in batch.rows)]
        while self._waiting:
            asked = [*inside, self._waiting[0]]
            if inside and sum(row.num_rows for row in asked) * max(row.needed for row in asked) > self._batch_tokens:
                return
            row = self._waiting.popleft()
            found = self._prefixes.find(row.request.members, row.token_ids) if self._joins else None
            others = bool(self._waiting or self._reading)
            if found is not None and (not others or _is_worth_it(len(found.token_ids), row.num_prompt)):
                row.cache, row.num_read, row.logits = found.cache, len(found.token_ids), found.logits
                row.generation.num_read = row.num_read
            self._reading.append(row)
            inside = asked

    @contextlib.contextmanager
    def _ends_on_error(self, rows: Sequence[_Row]) -> Iterator[None]:
        """An error inside ends these requests, whose cache is half written, and is raised where they are waited for."""
        rows = list(rows)
        try:
            yield
        except BaseException as error:
            self._waiting = deque(row for row in self._waiting if row not in rows)
            self._reading = [row for row in self._reading if row not in rows]
            self._batches = [batch for batch in self._batches if not any(row in rows for row in batch.rows)]
            for row in rows:
                row.generation.end("stopped", error)
            if not isinstance(error, Exception):
                raise

    def _next_to_read(self) -> list[_Row]:
        """The first prompt, with others behind it that fit into the same pass."""
        first, *others = self._reading
        rows = [first]
        if first.num_read or not self._joins or first.num_prompt > _PREFILL_TOKENS:
            return rows
        for row in others:
            together = [*rows, row]
            width = max(one.num_prompt for one in together)
            if row.num_read or self._is_switched_off(row) != self._is_switched_off(first):
                continue
            if sum(one.num_rows for one in together) * width > _PREFILL_TOKENS:
                break
            rows = together
        return rows

    def _read(self, rows: list[_Row]) -> None:
        """Read a piece of one prompt, or the whole of several; who has read all generates from now on."""
        first, off = rows[0], self._is_switched_off(rows[0])
        if first.logits is None:
            end = first.num_read + _PREFILL_TOKENS
            batch = _Batch(rows, first.cache, first.num_read, off)
            logits = self._forward(batch, [row.token_ids[:end] for row in rows])[:, -1]
            first.cache = batch.cache  # of several, that of all
            for row in rows:
                row.num_read = row.generation.num_read = min(end, row.num_prompt)
            if first.num_read < first.num_prompt:
                return
            for row, place in zip(rows, batch.places, strict=True):
                row.logits = row.request.members.next_token(logits[place.start : place.stop])
        self._reading = [row for row in self._reading if row not in rows]
        cache, first.cache = first.cache, None
        self._joins = is_joinable(cache)
        batch = _Batch(rows, with_room(cache) if is_joinable(cache) else cache, max(row.num_read for row in rows), off)
        self._batches.append(batch)
        self._choose(batch, [row.logits for row in rows if row.logits is not None])
        if batch.rows:
            self._merge()

    def _merge(self) -> None:
        """Put the batch that came last beside one of its kind."""
        *others, last = self._batches
        beside = next((batch for batch in others if batch.without_adapter == last.without_adapter), None)
        if beside is not None and is_joinable(beside.cache) and is_joinable(last.cache):
            join(beside.cache, beside.length, last.cache, last.length)
            beside.rows, beside.length = [*beside.rows, *last.rows], max(beside.length, last.length)
            self._batches.remove(last)

    def _decode(self, batch: _Batch) -> None:
        """The next token of each row."""
        logits = self._forward(batch, [row.token_ids for row in batch.rows])[:, -1]
        for row in batch.rows:
            row.num_read = len(row.token_ids)
        parts = [logits[place.start : place.stop] for place in batch.places]
        members = [row.request.members for row in batch.rows]
        self._choose(batch, [one.next_token(part) for one, part in zip(members, parts, strict=True)])

    def _choose(self, batch: _Batch, logits: Sequence[torch.Tensor]) -> None:
        """Take a token of each row's logits `[V]`, and let those go that have ended."""
        biased = [row.sampler.biased(one) for row, one in zip(batch.rows, logits, strict=True)]
        greedy = torch.stack(biased).argmax(-1).tolist()
        finite = torch.isfinite(torch.stack([one.max() for one in logits])).tolist()
        ended = []
        for row, one, scores, best, is_finite in zip(batch.rows, logits, biased, greedy, finite, strict=True):
            generation, sampling, constraint = row.generation, row.request.sampling, row.constraint
            if not is_finite:
                text = "logits: NaN or infinity; expected finite numbers; the weights or adapter are damaged"
                generation.end("stopped", LmtuneError(text))
                row.keeps = False
                ended.append(row)
                continue
            try:
                token = best if sampling.temperature == 0 and constraint is None else self._sampled(row, scores)
            except LmtuneError as error:
                generation.end("stopped", error)
                ended.append(row)
                continue
            if token in sampling.stop_token_ids:
                generation.end("stop")
                ended.append(row)
                continue
            row.token_ids.append(token)
            if row.request.num_logprobs is not None:
                generation.logprobs += token_logprobs(one[None], [token], row.request.num_logprobs)
            generation.add(token)
            if len(row.token_ids) - row.num_prompt == row.room:
                generation.end("length" if row.room == sampling.max_new_tokens else "context")
                ended.append(row)
        self._leave(batch, ended)

    def _sampled(self, row: _Row, logits: torch.Tensor) -> int:
        """The next token after `logits[V]`, of those that its constraint allows."""
        constraint = row.constraint
        allowed = None if constraint is None else constraint.allowed()
        token = row.sampler(logits if allowed is None else logits.masked_fill(~allowed.to(logits.device), -torch.inf))
        if constraint is not None and token not in row.request.sampling.stop_token_ids:
            constraint.advance(token)
        return token

    def _leave(self, batch: _Batch, leaving: Sequence[_Row]) -> None:
        """Take rows out of a batch, and keep what they have read."""
        if not leaving:
            return
        places = dict(zip(batch.rows, batch.places, strict=True))
        for row in leaving:
            if row.keeps and is_joinable(batch.cache):
                cache = copy_of(batch.cache)
                select(cache, batch.length, list(places[row]), row.num_read)
                ids = tuple(row.token_ids[: row.num_read])
                self._prefixes.add(row.request.members, Prefix(ids, cache, row.logits, row.num_prompt))
        batch.rows = [row for row in batch.rows if row not in leaving]
        if not batch.rows:
            self._batches.remove(batch)
        elif is_joinable(batch.cache):
            columns = max(row.num_read for row in batch.rows)
            select(batch.cache, batch.length, [place for row in batch.rows for place in places[row]], columns)
            batch.length = columns

    # --- the model

    def _is_switched_off(self, row: _Row) -> bool:
        """Whether the adapter is to be switched off for the whole pass: it has whole modules beside it, of which PEFT
        can leave out some kinds only by `disable_adapter`."""
        if not self._has_adapters or row.request.members.adapters != (BASE,):
            return False
        return any(hasattr(module, "original_module") for module in self.model.modules())

    def _forward(self, batch: _Batch, token_ids: Sequence[Sequence[int]], keeps: int = 1) -> torch.Tensor:
        """Read what is new of each row's tokens; returns fp32 logits `[R, K, V]` after the last `keeps` of each."""
        if batch.cache is None:  # not there yet, or the model hands back none and reads everything again
            batch.length = 0
        starts = [0 if batch.cache is None else row.num_read for row in batch.rows]
        new = [ids[start:] for ids, start in zip(token_ids, starts, strict=True)]
        width = max(len(ids) for ids in new)
        of_rows = [place for place, row in enumerate(batch.rows) for _ in range(row.num_rows)]
        input_ids = torch.tensor([[0] * (width - len(new[place])) + list(new[place]) for place in of_rows])
        # columns that a row does not have, before its first token
        missing = torch.tensor([batch.length + width - len(token_ids[place]) for place in of_rows])
        arguments: dict[str, Any] = {"logits_to_keep": keeps} if self._keeps_logits else {}
        if bool(missing.any()):
            columns = torch.arange(batch.length + width)
            arguments["attention_mask"] = (columns >= missing[:, None]).long().to(self.model.device)
            if self._takes_positions:
                positions = (columns[batch.length :] - missing[:, None]).clamp(min=0)
                arguments["position_ids"] = positions.to(self.model.device)
        switch: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if batch.without_adapter:
            switch = self.model.disable_adapter()
        elif self._has_adapters and any(row.request.members.adapters for row in batch.rows):
            # faster than `disable_adapter`, which looks through the whole model at each switch
            active = getattr(self.model, "active_adapter", BASE)
            arguments["adapter_names"] = [
                name for row in batch.rows for name in row.request.members.adapters or (active,)
            ]
        with torch.no_grad(), switch, unpacked_attention(self.model):
            output = self.model(
                input_ids=input_ids.to(self.model.device), past_key_values=batch.cache, use_cache=True, **arguments
            )
        batch.cache = getattr(output, "past_key_values", None)
        batch.length += width
        logits: torch.Tensor = output.logits[:, -keeps:].float()
        return logits


def _is_worth_it(num_read: int, num_prompt: int) -> bool:
    """Whether to go on from a prefix though others wait, who are read together, while such a prompt is read alone."""
    return num_read >= 128 or 2 * num_read >= num_prompt


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
