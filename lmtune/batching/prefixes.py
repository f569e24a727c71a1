"""Shared prefixes: which sequences begin with the same tokens, so that these are packed and computed once.

A system prompt, a few-shot header, one question with several answers: such sequences differ only in what follows.

    [You are kind. | Hi -> Hello]             [You are kind.] once
    [You are kind. | Bye -> See you]    ->    [Hi -> Hello] and [Bye -> See you] behind it

`find_prefixes` finds the groups from the token ids alone; `packing.pack_bins` then puts a group side by side.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_SHORTEST = 16  # tokens; a shorter prefix is not worth the bookkeeping
MASKED_BLOCK = 256  # queries that share a mask in `kernels.attention`
# A sequence behind a prefix attends through masks, which compute up to a block's keys that causal attention leaves out:
# this much of a token's other cost for each pair of its tokens (of a model with 30M to 1B parameters; less for larger
# ones).
_MASKED_PAIR = 1.25e-4
Ints = npt.NDArray[np.integer]


@dataclass(frozen=True)
class SharedPrefix:
    """`length` tokens with which each of `members` (indices) begins."""

    length: int
    members: tuple[int, ...]


def find_prefixes(shareable: Sequence[Ints], lengths: Sequence[int]) -> list[SharedPrefix]:
    """The groups of sequences to pack behind a shared prefix, such that together they save the most work.

    Sorted by their tokens, sequences with a common prefix are neighbours, and a group is an interval whose prefix is
    the least that any two neighbours in it share. Which intervals to take is decided from left to right: the best for
    the first `i` sequences is the best for the first `j` and the interval from `j` to `i`, for some `j`.

    Args:
        shareable: of each sequence the tokens that it may share, as `shareable_prefix` gives them.
        lengths: tokens of each whole sequence.
    """
    order = sorted(range(len(shareable)), key=lambda index: shareable[index].tobytes())
    common = [common_length(shareable[one], shareable[other]) for one, other in itertools.pairwise(order)]
    cuts = [place + 1 for place, length in enumerate(common) if length < _SHORTEST]
    found = []
    for start, end in itertools.pairwise([0, *cuts, len(order)]):
        costs = np.array([_masked(lengths[index]) for index in order[start:end]])
        for first, last in _best_intervals(np.array(common[start : end - 1], dtype=np.int64), costs):
            members = order[start + first : start + last]
            found.append(SharedPrefix(min(common[start + first : start + last - 1]), tuple(sorted(members))))
    return found


def _masked(length: int) -> float:
    """What a sequence of `length` tokens computes behind a prefix and would not alone, in tokens."""
    return _MASKED_PAIR * length * min(length, MASKED_BLOCK)


def _best_intervals(common: npt.NDArray[np.int64], costs: npt.NDArray[np.float64]) -> list[tuple[int, int]]:
    """Intervals `[first, last)` of two or more sequences that save the most.

    Args:
        common: `[n - 1]`, tokens that each shares with its successor.
        costs: `[n]`, in tokens, what being in an interval costs each.
    """
    count = len(costs)
    saved, begin = np.zeros(count + 1), np.arange(-1, count)
    before = np.concatenate([[0.0], np.cumsum(costs)])
    least = np.zeros(count, dtype=np.int64)  # least[j]: what those from j to the last one seen have in common
    for end in range(2, count + 1):
        least[end - 2] = common[end - 2]
        np.minimum(least[: end - 1], common[end - 2], out=least[: end - 1])
        gain = saved[: end - 1] + np.arange(end - 1, 0, -1) * least[: end - 1] - (before[end] - before[: end - 1])
        best = int(gain.argmax())
        saved[end], begin[end] = (gain[best], best) if gain[best] > saved[end - 1] else (saved[end - 1], end - 1)
    intervals, end = [], count
    while end > 0:
        if end - begin[end] > 1:
            intervals.append((int(begin[end]), end))
        end = int(begin[end])
    return intervals[::-1]


def shareable_prefix(input_ids: Ints, loss_mask: npt.NDArray[np.bool_]) -> Ints:
    """What a sequence of `input_ids[T]` may share: all before its first target, but for one token of its own."""
    before = int(np.argmax(loss_mask)) if loss_mask.any() else len(input_ids)
    return input_ids[: min(before, len(input_ids) - 1)]


def common_length(one: Ints, other: Ints) -> int:
    """How many of the first tokens are equal."""
    size = min(len(one), len(other))
    different = np.flatnonzero(one[:size] != other[:size])
    return int(different[0]) if len(different) else size
