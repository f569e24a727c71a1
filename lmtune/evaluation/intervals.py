"""How far a score may be from that of other rows of the same kind, and whether one model beats another.

The bootstrap draws as many rows as there are, again and again, and looks how the score moves. Of two models the same
rows are drawn for both, so that rows which are hard for both move neither. Few rows spread less in a resample than they
do in the world, so the percentiles are widened as a t distribution is wider than a normal one
(https://arxiv.org/abs/1411.5279, 5.2).

Where rows are right or wrong the bootstrap of few rows, or of a share near 0 or 1, is too narrow: 8 of 8 would be sure.
A share has Wilson's interval, a share of wins that of Agresti and Min, who add half a row to each outcome
(https://doi.org/10.1002/sim.1781).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmtune.runs.tables import wilson

Float64 = npt.NDArray[np.float64]
Score = Callable[[Float64], Float64]  # of sums of statistics [..., S]
RESAMPLES = 2000
_AT_ONCE = 4_000_000  # drawn rows that are held
_Z = 1.959963984540054  # of a normal distribution, leaves 2.5 % above it
_FEWEST = 6  # of 5 rows all may be on one side by chance: 2 times 2 to the -5 is more than 5 %


class Interval(NamedTuple):
    """Where the score of all rows of this kind is, in 95 of 100 cases."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """One model beside another, on the same rows.

    Attributes:
        value: the second's score less the first's.
        interval: of `value`.
        wins, losses, ties: rows on which the second is better, worse, as good.
        win_share: of rows that the second wins, ties counting half.
        win_interval: of `win_share`.
    """

    value: float
    interval: Interval
    wins: int
    losses: int
    ties: int
    win_share: float
    win_interval: Interval

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `not told apart`."""
        if self.wins + self.losses + self.ties < _FEWEST:
            return "not told apart"
        if self.interval.low > 0:
            return "better"
        return "worse" if self.interval.high < 0 else "not told apart"

    def sentence(self, name: str = "tuned") -> str:
        """In words: `tuned is better: it wins 61 to 74 of 100 rows`."""
        return _in_words(name, self.verdict, self.win_interval)


def share_sentence(name: str, wins: int, losses: int, ties: int) -> str:
    """Which of two models somebody prefers, in words, by how many rows `name` wins, loses and ties."""
    if not wins + losses + ties:
        return "no row has a verdict"
    found = win_interval(wins, losses, ties)
    is_sure = wins + losses + ties >= _FEWEST
    verdict = "better" if is_sure and found.low > 0.5 else "worse" if is_sure and found.high < 0.5 else "not told apart"
    return _in_words(name, verdict, found)


def _in_words(name: str, verdict: str, wins: Interval) -> str:
    low, high = (round(100 * edge) for edge in wins)
    if verdict == "not told apart":
        return f"{name} is not told apart from the other: it wins {low} to {high} of 100 rows; more rows would tell"
    return f"{name} is {verdict}: it wins {low} to {high} of 100 rows"


def interval(statistics: Float64, score: Score, seed: int = 0, may_be_share: bool = True) -> Interval | None:
    """Of `score(statistics.sum(0))` of rows' statistics `[N, S]`; None for fewer than two rows.

    Of statistics that are 0 or 1, and a 1 behind it, the score is taken for the share that they add up to, unless
    `may_be_share` says that they are numbers: rewards may all be 0.
    """
    count = len(statistics)
    if count < 2:
        return None
    whole = statistics.shape[1] == 2 and (statistics[:, 1] == 1).all() and np.isin(statistics[:, 0], (0, 1)).all()
    if may_be_share and whole:
        return Interval(*wilson(float(statistics[:, 0].mean()), count))
    return _percentiles(score(_resampled(statistics, seed)), count)


def interval_of(measure: Callable[[npt.NDArray[np.int64]], float | None], count: int, seed: int = 0) -> Interval | None:
    """Of a measure of some of `count` rows, by their numbers, that is no function of sums; None if it has no value."""
    if count < 2:
        return None
    generator = np.random.default_rng(seed)
    found = [measure(generator.integers(0, count, count)) for _ in range(RESAMPLES)]
    values = np.array([value for value in found if value is not None])  # none where a resample lacks a class
    return _percentiles(values, count) if len(values) > RESAMPLES // 2 else None


def win_interval(wins: int, losses: int, ties: int) -> Interval:
    """Of the share of rows that one of two wins, ties counting half, by how many it wins, loses and ties.

    Source: Agresti and Min, https://doi.org/10.1002/sim.1781, with half a row more won and lost, and one more tied.
    """
    count, better, worse = wins + losses + ties + 2.0, wins + 0.5, losses + 0.5
    middle = (better - worse) / count
    half = _Z * math.sqrt(max(0.0, better + worse - (better - worse) ** 2 / count)) / count
    return Interval(max(0.0, (1 + middle - half) / 2), min(1.0, (1 + middle + half) / 2))


def difference(
    first: Float64, second: Float64, score: Score, seed: int = 0, higher_is_better: bool = True
) -> Difference | None:  # fmt: skip
    """The second of two models beside the first, by their statistics `[N, S]` of the same rows; None for no rows.

    Args:
        first, second: of the same rows in the same order.
        score: of sums of statistics.
        seed: equal seeds draw equal rows.
        higher_is_better: of losses it is not.
    """
    if not len(first):
        return None
    sign = 1.0 if higher_is_better else -1.0
    both = np.concatenate([first, second], 1)
    of_rows = sign * (score(second) - score(first))
    wins, losses = int((of_rows > 1e-12).sum()), int((of_rows < -1e-12).sum())
    ties = len(first) - wins - losses
    sums = _resampled(both, seed)
    size = first.shape[1]
    apart = score(sums[:, size:]) - score(sums[:, :size])
    value = float(score(second.sum(0)) - score(first.sum(0)))
    return Difference(
        sign * value, _percentiles(sign * apart, len(first)), wins, losses, ties, (wins + ties / 2) / len(first),
        win_interval(wins, losses, ties),
    )  # fmt: skip


def _resampled(statistics: Float64, seed: int) -> Float64:
    """`[RESAMPLES, S]`: sums over rows drawn with replacement."""
    generator, rows = np.random.default_rng(seed), len(statistics)
    at_once = max(1, _AT_ONCE // rows)
    parts = []
    for start in range(0, RESAMPLES, at_once):
        count = min(at_once, RESAMPLES - start)
        drawn = generator.integers(0, rows, (count, rows)) + rows * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * rows).reshape(count, rows)
        parts.append(times @ statistics)
    return np.concatenate(parts)


def _percentiles(values: Float64, rows: int) -> Interval:
    """The middle 95 % of resampled values, widened for few rows."""
    below = _normal_share(-student(rows - 1) * math.sqrt(rows / max(1, rows - 1)))
    low, high = np.quantile(values, [below, 1 - below])
    return Interval(float(low), float(high))


def _normal_share(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


def student(freedom: int) -> float:
    """The quantile of Student's t that leaves 2.5 % above it; from the normal one, by Cornish and Fisher's series."""
    z, n = _Z, max(1, freedom)
    if n <= 2:
        return (12.706204736, 4.302652730)[n - 1]
    terms: tuple[float, ...] = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / n**power for power, term in enumerate(terms, start=1))
