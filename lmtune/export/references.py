"""The tuned model and the base of a run in this process, asked as an endpoint is: log-probabilities and answers.

Both compute in fp32 over the weights of training, dequantized: what an exact export would hold.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from lmtune.config.schema import LoraConfig
from lmtune.data.rendering import Renderer
from lmtune.errors import ModelError
from lmtune.export.rounding import Precision, rounded
from lmtune.inference.load import LoadedModel, load_for_inference
from lmtune.inference.request import Request, Sampling
from lmtune.models.base import load_model
from lmtune.models.block_weights import BlockWeights
from lmtune.models.locate import run_config
from lmtune.models.verify import LogitsReader
from lmtune.runs.store import RunDirectory

Float64 = npt.NDArray[np.float64]

_AT_ONCE = 256  # places whose logits are held


@dataclass(frozen=True)
class ScoredTokens:
    """Tokens, and at some places log-probabilities of the next token that an endpoint gives.

    Attributes:
        ids: the tokens.
        places: by the number of tokens read, ascending, log-probabilities by token id.
    """

    ids: tuple[int, ...]
    places: Mapping[int, Mapping[int, float]]


class Reference:
    """One of the two models."""

    def __init__(self, loaded: LoadedModel, weights: BlockWeights, use_base: bool) -> None:
        self._loaded, self._weights, self._use_base = loaded, weights, use_base
        self._dtype = torch.float32
        self._reader = LogitsReader(weights.base, self._computing)
        self._numbers = itertools.count()

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        switch = self._loaded.use_base() if self._use_base else contextlib.nullcontext()
        with switch, self._weights.in_dtype(self._dtype, dequantize=True):
            yield

    def logprobs(self, asked: ScoredTokens, kind: Precision | None = None) -> list[Float64]:
        """At each of its places the log-probabilities `[k]` of the tokens there, in their order.

        With `kind` those of the model with its weights rounded, or computed in bf16.
        """
        self._dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        with contextlib.nullcontext() if kind is None or kind == "bf16" else rounded(self._weights.base, kind):
            self._reader.read(next(self._numbers), asked.ids)
            found, places = list[Float64](), list(asked.places.items())
            for start in range(0, len(places), _AT_ONCE):  # each costs a pass through the head, and rounding it
                some = places[start : start + _AT_ONCE]
                first, last = some[0][0], some[-1][0]
                logits = self._reader.logits(asked.ids, first - 1, last)  # [last - first + 1, V]
                for place, tops in some:
                    row = logits[place - first].double()
                    found.append((row[torch.tensor(list(tops))] - row.logsumexp(-1)).numpy())
        return found

    def answers(self, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int]) -> list[list[int]]:
        """Greedy answers, without their end token."""
        stops = tuple(self._loaded.renderer.stop_token_ids)
        members = self._loaded.answering(self._use_base)
        requests = [
            Request(prompt, Sampling(max_new_tokens=most, stop_token_ids=stops), members)
            for prompt, most in zip(prompts, max_new_tokens, strict=True)
        ]
        return self._loaded.engine.generate(requests)


@dataclass(frozen=True)
class References:
    """Both models of a run, and how it renders."""

    tuned: Reference
    base: Reference
    renderer: Renderer
    system: str | None
    vocabulary: int


def load_references(run: RunDirectory, base: str | None = None) -> References:
    """The tuned model and the base of a run; `base` is where the base is now, if it was moved.

    Raises:
        ModelError: the run has no result, or is a classifier, which an endpoint does not serve as text.
    """
    loaded = load_for_inference(str(run.path), base=base)
    if loaded.head is not None:
        raise ModelError(f"{run.path}: a classifier, whose scores no endpoint of this protocol gives; predict with it")
    weights = BlockWeights(loaded.model)
    plain, of_base = loaded, weights
    config = run_config(run, base)
    if not isinstance(config.tuning, LoraConfig):
        plain = replace(loaded, model=load_model(config.model))
        of_base = BlockWeights(plain.model)
    size = int(weights.base.config.get_text_config().vocab_size)
    return References(
        Reference(loaded, weights, False), Reference(plain, of_base, loaded.has_adapter), loaded.renderer,
        loaded.system, size,
    )  # fmt: skip
