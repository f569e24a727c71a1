"""How near is what an endpoint says to the tuned model, and to the base? By log-probabilities, or else by answers.

By log-probabilities: an endpoint gives those of a few tokens at a place. These and *all others together* are a
distribution, and the Kullback-Leibler divergence of a model's from it, in nats a token, is at most that of the whole
distributions. By answers: the share of rows on which the answer begins otherwise, among those on which tuned and base
begin differently.

What the endpoint serves is what it is near to, if it is twice as far from the other one. Near means: not farther than
four times what four bits a weight explain, measured on this model. And the *share* of the way from the base to the
tuned model, along the log-probabilities in which these two differ, must be about 1 or 0: rounding adds noise in all
directions, an adapter at half its strength lies halfway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

Weights = Literal["tuned", "base", "neither", "unknown"]
Float64 = npt.NDArray[np.float64]

_LEAST = 1e-8  # a probability, since logs of rounded ones may be anything below
_SAME = 1e-6  # nats a token, of two models that do not differ
_FLOOR = 1e-7  # nats a token: sums in another order, keys and values in 16 bit
_TIMES = 4.0  # what four bits a weight explain
_EXACT_LIMIT = 1e-3  # nats a token that are near in any case: 16 bit computes so
_ANSWERS_LIMIT = 0.5
_SHARE_LIMIT = 0.3


def divergence(model: Float64, served: Float64) -> float:
    """Of the model's log-probabilities `[k]` from those that are served, each with the rest as one more; in nats."""
    p, q = (np.exp(values) for values in (model, served))
    p, q = (np.append(values, 1 - values.sum()).clip(_LEAST, 1.0) for values in (p, q))
    return max(0.0, float((p * np.log(p / q)).sum()))


@dataclass(frozen=True)
class Nearness:
    """How far what is served is from both models.

    Attributes:
        by: log-probabilities (nats a token), or answers (share of rows).
        to_tuned, to_base: how far.
        between: how far the base is from the tuned model on the same.
        share: of the way from the base (0) to the tuned model (1); None of answers.
        rows, count: how many rows, and tokens or answers, this is of.
        expected: by type of weights, how far rounding moves the tuned model, in nats a token; `bf16`: computing in it.
    """

    by: Literal["logprobs", "answers"]
    to_tuned: float
    to_base: float
    between: float
    rows: int
    count: int
    share: float | None = None
    expected: Mapping[str, float] = field(default_factory=dict)

    @property
    def limit(self) -> float:
        """Up to which distance something is near."""
        return max(_EXACT_LIMIT, _TIMES * self.expected.get("q4_k_m", 0.0)) if self.by == "logprobs" else _ANSWERS_LIMIT

    @property
    def tells(self) -> bool:
        """Whether base and tuned model differ on this at all."""
        return self.count > 0 and self.between > _SAME

    @property
    def weights(self) -> Weights:
        """What is served."""
        least, most = sorted((self.to_tuned, self.to_base))
        if not self.tells:
            return "unknown"
        if least > self.limit:
            return "neither"
        if most < 2 * least + _SAME:
            return "unknown"
        is_tuned = self.to_tuned < self.to_base
        if self.share is not None and abs(self.share - is_tuned) > _SHARE_LIMIT:
            return "neither"
        return "tuned" if is_tuned else "base"

    @property
    def nearest_type(self) -> str | None:
        """The type of weights whose rounding explains the distance to the tuned model best."""
        if not self.expected:
            return None
        return self.fitting_types[0]

    @property
    def fitting_types(self) -> list[str]:
        """The nearest type, then those that explain the distance within a factor of 3."""
        found = sorted(self.expected, key=self._off)
        return [name for name in found if name == found[0] or self._off(name) < np.log(3)]

    def _off(self, name: str) -> float:
        return float(abs(np.log((self.to_tuned + _FLOOR) / (self.expected[name] + _FLOOR))))


def of_places(
    served: Sequence[Float64], tuned: Sequence[Float64], base: Sequence[Float64], rows: int
) -> Nearness:  # fmt: skip
    """By the log-probabilities `[k]` at each place."""
    count = len(served)
    to_tuned, to_base, between = (
        sum(divergence(one, other) for one, other in zip(models, others, strict=True)) / max(1, count)
        for models, others in ((tuned, served), (base, served), (tuned, base))
    )
    return Nearness("logprobs", to_tuned, to_base, between, rows, count, _share(served, tuned, base))


def _share(served: Sequence[Float64], tuned: Sequence[Float64], base: Sequence[Float64]) -> float | None:
    """The projection of what is served on the way from base to tuned, each token weighted by its probability."""
    along = length = 0.0
    for place in zip(served, tuned, base, strict=True):
        said, one, other = (values.clip(np.log(_LEAST)) for values in place)
        weight, way = (np.exp(one) + np.exp(other)) / 2, one - other
        along += float((weight * way * (said - other)).sum())
        length += float((weight * way * way).sum())
    return along / length if length > 0 else None


def of_answers(served: Sequence[str], tuned: Sequence[str], base: Sequence[str]) -> Nearness:
    """By how answers begin; `tuned` and `base` hold the first tokens of theirs."""
    both = [
        (said.strip(), one.strip(), other.strip())
        for said, one, other in zip(served, tuned, base, strict=True) if one.strip() != other.strip()
    ]  # fmt: skip
    count = len(both)
    begun = [_begun_as(*row) for row in both]
    as_tuned, as_base = begun.count("tuned"), begun.count("base")
    between = count / max(1, len(served))
    return Nearness("answers", 1 - as_tuned / max(1, count), 1 - as_base / max(1, count), between, len(served), count)


def _begun_as(said: str, tuned: str, base: str) -> str | None:
    """Which of two beginnings an answer has; where it has both, as one begins with the other, the longer one."""
    found = [
        (len(wanted), name) for name, wanted in (("tuned", tuned), ("base", base))
        if (said.startswith(wanted) if wanted else not said)
    ]  # fmt: skip
    return max(found)[1] if found else None
