"""One token after another: what a model has read, which token comes next, and the text of the tokens so far.

`ReadTokens` holds token ids with their KV cache and reads on from wherever a new prompt departs from the old;
`Sampler` chooses among the logits; `PieceDecoder` lets text out as soon as it is whole, in the manner of Hugging Face's
text-generation-inference: a token that ends inside a UTF-8 character waits for the next. `lmtune.inference.chat` makes
conversations of these.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from lmtune.data.replies import ReplyParser
from lmtune.errors import LmtuneError
from lmtune.inference.load import LoadedModel
from lmtune.kernels.attention import NAME as BY_DOCUMENT
from lmtune.models.structure import base_of, max_positions

_PREFILL_TOKENS = 512  # read at once, so that a long prompt can be stopped and lets other conversations in
_PENDING_TOKENS = 8  # no character is longer; what is still incomplete then is no UTF-8 and is shown as it is
_MIN_TEMPERATURE = 1e-6  # below it fp32 would divide by zero, and the likeliest token has all the weight anyway


class ReadTokens:
    """What one model, with or without its adapter, has read in one conversation.

    Attributes:
        token_ids: the tokens that the cache holds.
        is_whole: false while a forward pass is at work; an interrupted one leaves half a cache, to be thrown away.
    """

    def __init__(self, model: LoadedModel, use_base: bool) -> None:
        self.model, self.use_base = model, use_base
        self.token_ids: list[int] = []
        self.is_whole = True
        self._cache: Any = None
        self._prompt: tuple[list[int], torch.Tensor] | None = None
        self._keeps = "logits_to_keep" in inspect.signature(base_of(model.model).forward).parameters

    def read_prompt(self, prompt: Sequence[int]) -> Iterator[torch.Tensor]:
        """Read `prompt` in parts, but for what it shares with the tokens read before; yields logits[V] of each part.

        The same prompt again, as another try has it, takes the logits of the first time, so that an equal seed gives
        an equal answer to the last bit.
        """
        prompt = list(prompt)
        before, self._prompt = self._prompt, None
        if before is not None and before[0] == prompt and self._crop(len(prompt)):
            self._prompt = before
            yield before[1]
            return
        self._crop(_num_shared(self.token_ids, prompt[:-1]))
        rest = prompt[len(self.token_ids) :]
        for start in range(0, len(rest), _PREFILL_TOKENS):
            logits = self.read(rest[start : start + _PREFILL_TOKENS])
            if start + _PREFILL_TOKENS >= len(rest):
                self._prompt = prompt, logits
            yield logits

    def read(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Read further tokens; returns fp32 logits[V] after the last.

        Raises:
            LmtuneError: the logits are not finite.
        """
        model = self.model.model
        after = [*self.token_ids, *token_ids]
        # A model that hands back no cache reads everything again at each token.
        fed = after if self._cache is None else list(token_ids)
        input_ids = torch.tensor([fed], device=model.device)
        arguments: dict[str, Any] = {"logits_to_keep": 1} if self._keeps else {}
        if self.use_base:
            # Not `disable_adapter`, which looks through the whole model at each switch: half the speed of a small one.
            arguments["adapter_names"] = ["__base__"]
        self.is_whole = False
        # The lock, because PEFT tells its layers by hooks which adapter to use.
        with self.model.lock, torch.no_grad(), ordinary_attention(model):
            output = model(input_ids=input_ids, past_key_values=self._cache, use_cache=True, **arguments)
        self._cache, self.token_ids = getattr(output, "past_key_values", None), after
        self.is_whole = True
        logits: torch.Tensor = output.logits[0, -1].float()
        if not torch.isfinite(logits.max()):
            raise LmtuneError(f"{self.model.name} answers with NaN or infinity; its weights or adapter are damaged")
        return logits

    def _crop(self, length: int) -> bool:
        """Forget all but the first `length` tokens. False: this cache cannot, and everything is forgotten."""
        extra = len(self.token_ids) - length
        if extra == 0:
            return True
        if extra > 0 and getattr(self._cache, "is_croppable", False):
            # A sliding window that has moved on no longer holds what it should go back to, and says so.
            with contextlib.suppress(RuntimeError):
                self._cache.crop(-extra)
                if self._cache.get_seq_length() == length:
                    self.token_ids = self.token_ids[:length]
                    return True
        self._cache, self.token_ids = None, []
        return False


class Sampler:
    """Chooses tokens with transformers' own warpers and a random generator that no other answer shares."""

    def __init__(self, temperature: float, top_p: float, seed: int) -> None:
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

        self._greedy, self._seed = temperature == 0, seed
        self._generator: torch.Generator | None = None
        self._warp = LogitsProcessorList([TemperatureLogitsWarper(max(float(temperature), _MIN_TEMPERATURE))])
        if top_p < 1:
            self._warp.append(TopPLogitsWarper(float(top_p)))

    def __call__(self, logits: torch.Tensor) -> int:
        """The next token after logits[V]."""
        if self._greedy:
            return int(logits.argmax())
        if self._generator is None:
            self._generator = torch.Generator(logits.device).manual_seed(self._seed)
        # Less its maximum the scores overflow at no temperature, and the distribution is the same.
        scores = self._warp(None, (logits - logits.max())[None])
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))


class PieceDecoder:
    """Turns tokens into pieces of text as they come, never cut inside a character.

    Args:
        decode: text of token ids, for example `Renderer.marked_text`.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []  # tokens whose text is out; some tokenizers need them to place a space
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """What can be shown now, maybe nothing."""
        self._pending.append(token)
        text = self._new_text()
        if text and not text.endswith("\ufffd"):
            self._context, self._pending = self._pending, []
            return text
        if len(self._pending) < _PENDING_TOKENS:
            return ""
        self._context, self._pending = [], []
        return text

    def finish(self) -> str:
        """What was held back, less a character that was never completed."""
        return self._new_text().rstrip("\ufffd") if self._pending else ""

    def _new_text(self) -> str:
        return self._decode(self._context + self._pending)[len(self._decode(self._context)) :]


class ReplyDecoder:
    """Turns tokens into pieces of a reply in the form of `lmtune.data.replies`."""

    def __init__(self, pieces: PieceDecoder, parser: ReplyParser) -> None:
        self._pieces, self._parser = pieces, parser

    def add(self, token: int) -> str:
        """What can be shown now, maybe nothing."""
        return self._parser.feed(self._pieces.add(token))

    def finish(self) -> str:
        """What was held back."""
        return self._parser.feed(self._pieces.finish()) + self._parser.finish()


@contextlib.contextmanager
def ordinary_attention(model: Any) -> Iterator[None]:
    """Run the block with an attention that knows KV caches and padding, whatever training has switched to."""
    base = base_of(model)
    before = base.config._attn_implementation
    if before != BY_DOCUMENT:
        yield
        return
    base.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def _num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences have in common from the start."""
    for index, (ours, theirs) in enumerate(zip(first, second, strict=False)):
        if ours != theirs:
            return index
    return min(len(first), len(second))


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    stop_token_ids: Sequence[int],
    max_new_tokens: int,
    batch_tokens: int = 16_384,
    advance: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Greedy answers to many prompts, as a `ChatSession` at temperature 0 would give them, to rounding.

    Args:
        model: a causal language model in evaluation mode, with or without adapter.
        tokenizer: gives the padding token.
        prompts: token ids, none empty.
        stop_token_ids: what ends an answer.
        max_new_tokens: where an answer that does not stop is cut.
        batch_tokens: prompts and answers of one batch hold at most so many tokens, padding included.
        advance: is told after each batch how many answers it gave.

    Returns:
        The new tokens of each prompt, in the order of the prompts, without the stop token.

    Raises:
        LmtuneError: a prompt leaves no room for an answer.
    """
    stops = sorted(set(stop_token_ids))
    limit = max_positions(model)
    for index, prompt in enumerate(prompts):
        if limit is not None and len(prompt) >= limit:
            raise LmtuneError(f"prompt {index} is {len(prompt)} tokens long, and the model reads at most {limit}")
    answers: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    while by_length:
        longest = len(prompts[by_length[0]])
        room = max_new_tokens if limit is None else min(max_new_tokens, limit - longest)
        rows = max(1, batch_tokens // (longest + room))
        batch, by_length = by_length[:rows], by_length[rows:]
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
        generated = _generate(model, [list(prompts[index]) for index in batch], stops, room, pad)
        for index, new in zip(batch, generated, strict=True):
            end = next((place for place, token in enumerate(new) if token in stops), len(new))
            answers[index] = new[:end]
        if advance is not None:
            advance(len(batch))
    return answers


def _generate(model: Any, prompts: list[list[int]], stops: list[int], max_new_tokens: int, pad: int) -> list[list[int]]:
    """One batch through `model.generate`, padded on the left; what follows each prompt, padding included."""
    from transformers import GenerationConfig

    width = len(prompts[0])
    input_ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    settings = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=pad,
        use_cache=True,
    )  # fmt: skip
    with torch.no_grad(), ordinary_attention(model), _no_generation_config(model):
        output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=settings)
    new: list[list[int]] = output[:, width:].tolist()
    return new


@contextlib.contextmanager
def _no_generation_config(model: Any) -> Iterator[None]:
    """Inside the block the model brings no generation settings of its own.

    transformers takes from them whatever a call leaves open (suppressed tokens, a least length, penalties), so that a
    batch would answer otherwise than a chat.
    """
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
