"""The plan: which examples make each optimizer step, and how they are dealt to processes and micro-batches.

A step is defined by its examples. The plan is a pure function of the row lengths, the settings and the step, so every
process knows all of it without a word to the others, and a resumed run goes on exactly where it was.

    plan = Plan(num_tokens, num_trained, train_config, world_size=2, micro_batch_tokens=4096)
    plan.step(17).shares[rank]      # this process's micro-batches, as lists of rows
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmtune.config import TrainConfig
from lmtune.data.packing import fill
from lmtune.data.prefixes import Ints, SharedPrefix, find_prefixes

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TokenCost:
    """What makes one token dearer than another, as parts of what each costs.

    Attributes:
        before: for each token before it in its document: attention.
        trained: if it is trained: the output head.
    """

    before: float = 0.0
    trained: float = 0.0


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step.

    Attributes:
        step: counted from 1.
        epoch: how much of the data was seen after this step, in epochs.
        rows: the examples of the step, over all processes.
        num_tokens: tokens of these rows.
        num_trained: trained tokens of these rows, the loss's denominator.
        shares: for each process, its micro-batches, each a list of rows; a share may be empty.
    """

    step: int
    epoch: float
    rows: list[int]
    num_tokens: int
    num_trained: int
    shares: list[list[list[int]]]


class Plan:
    """All steps of a run."""

    def __init__(
        self, num_tokens: Int32, num_trained: Int32, train: TrainConfig, world_size: int, micro_batch_tokens: int,
        beginning_of: Callable[[int], Ints] | None = None, cost: TokenCost = TokenCost(),
    ) -> None:  # fmt: skip
        """
        Args:
            num_tokens: `[rows]`, tokens of each row.
            num_trained: `[rows]`, trained tokens of each row.
            train: batch size, epochs or steps, seed.
            world_size: processes.
            micro_batch_tokens: the most tokens in a micro-batch (a longer row stands alone).
            beginning_of: the tokens with which a row may share a prefix with others; None where none are shared.
            cost: of tokens beside each other, by which rows are dealt to processes.
        """
        self.beginning_of, self.cost = beginning_of, cost
        self.num_tokens, self.num_trained = num_tokens, num_trained
        self.batch_size, self.seed = train.batch_size, train.seed
        self.world_size, self.micro_batch_tokens = world_size, micro_batch_tokens
        self.steps_per_epoch = math.ceil(len(num_tokens) / train.batch_size)
        self.total_steps = self.count_steps(len(num_tokens), train)
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None

    @staticmethod
    def count_steps(num_rows: int, train: TrainConfig) -> int:
        """The optimizer steps of a run over `num_rows` rows; the last step of an epoch may have fewer examples."""
        return train.max_steps or max(1, round(train.epochs * math.ceil(num_rows / train.batch_size)))

    def step(self, step: int) -> StepPlan:
        """The plan of `step`, counted from 1."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        rows = self._permutation(epoch)[place * self.batch_size : (place + 1) * self.batch_size]
        beginning_of = self.beginning_of
        lengths = self.num_tokens[rows].tolist()
        prefixes = find_prefixes([beginning_of(int(row)) for row in rows], lengths) if beginning_of is not None else []
        shares = deal(lengths, self.num_trained[rows].tolist(), self.world_size, prefixes, self.cost)
        return StepPlan(
            step=step,
            epoch=epoch + min(1.0, (place + 1) * self.batch_size / len(self.num_tokens)),
            rows=rows.tolist(),
            num_tokens=sum(lengths),
            num_trained=int(self.num_trained[rows].sum()),
            shares=[self._micro_batches(rows, lengths, share, prefixes) for share in shares],
        )

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        """The order of all rows in `epoch`, from (seed, epoch) alone."""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.num_tokens))
        return self._order[1]

    def _micro_batches(
        self, rows: npt.NDArray[np.int64], lengths: Sequence[int], share: Sequence[int],
        prefixes: Sequence[SharedPrefix],
    ) -> list[list[int]]:  # fmt: skip
        """The rows of one process's `share` (places in the step), grouped."""
        place_in_share = {place: index for index, place in enumerate(share)}
        inside = (
            (prefix.length, tuple(place_in_share[place] for place in prefix.members if place in place_in_share))
            for prefix in prefixes
        )
        shared = [SharedPrefix(length, members) for length, members in inside if len(members) > 1]
        groups = fill([lengths[place] for place in share], self.micro_batch_tokens, shared)
        return [[int(rows[share[index]]) for index in group] for group in groups]


def deal(
    lengths: Sequence[int], trained: Sequence[int], world_size: int, prefixes: Sequence[SharedPrefix] = (),
    cost: TokenCost = TokenCost(),
) -> list[list[int]]:  # fmt: skip
    """Split a step's rows over the processes so that each has about the same to compute.

    The dearest row first, each to the process that is then the least loaded: Graham's LPT rule, at most a third above
    the best possible. A shared prefix costs a process once, with the first of its rows.

    Args:
        lengths: tokens of each row.
        trained: trained tokens of each row.
        world_size: processes.
        prefixes: which rows begin with the same tokens.
        cost: of tokens beside each other.

    Returns:
        For each process the places of its rows in `lengths`.
    """
    if world_size == 1:
        return [list(range(len(lengths)))]

    def work(tokens: int, before: int = 0) -> float:
        return tokens * (1 + cost.before * (tokens / 2 + before))  # of its own tokens each sees half

    prefix_of = {place: index for index, prefix in enumerate(prefixes) for place in prefix.members}
    first = {index: work(prefix.length) for index, prefix in enumerate(prefixes)}
    own = []
    for place, (length, labels) in enumerate(zip(lengths, trained, strict=True)):
        shared = prefixes[prefix_of[place]].length if place in prefix_of else 0
        own.append(work(length - shared, shared) + labels * cost.trained)
    shares: list[list[int]] = [[] for _ in range(world_size)]
    load, held = [0.0] * world_size, [set[int]() for _ in range(world_size)]
    for place in sorted(range(len(lengths)), key=lambda place: (-own[place], place)):
        group = prefix_of.get(place)
        extra = [own[place] + (first[group] if group is not None and group not in has else 0.0) for has in held]
        rank = min(range(world_size), key=lambda rank: (load[rank] + extra[rank], rank))
        shares[rank].append(place)
        load[rank] += extra[rank]
        if group is not None:
            held[rank].add(group)
    return shares
