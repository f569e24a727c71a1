"""The plan: which examples make each optimizer step, and how they are dealt to processes and micro-batches.

A step is defined by its examples. The plan is a pure function of the lengths, the settings and the step, so every
process knows all of it without a word to the others, and a resumed run goes on exactly where it was. What is dealt out
is the sequence: those of one row may be computed in different micro-batches and processes.

    plan = Plan(data.sequences, train_config, world_size=2, micro_batch_tokens=4096)
    plan.step(17).shares[rank]      # this process's micro-batches, as lists of sequences
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmtune.batching.packing import fill
from lmtune.batching.prefixes import Ints, SharedPrefix, find_prefixes
from lmtune.config.schema import TrainConfig
from lmtune.data.sequences import SequenceTable


@dataclass(frozen=True)
class TokenCost:
    """What makes one token dearer than another, as parts of what each costs.

    Attributes:
        before: for each token before it in its document: attention.
        trained: if it is trained: the output head.
    """

    before: float = 0.0
    trained: float = 0.0


class Unit(NamedTuple):
    """A sequence of a step: number `document` of row `row`, which is number `example` of the step's examples."""

    example: int
    row: int
    document: int


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step.

    Attributes:
        step: counted from 1.
        epoch: how much of the data was seen after this step, in epochs.
        rows: the examples of the step, over all processes.
        num_tokens: tokens of these rows.
        num_targets: trained tokens of these rows, the loss's denominator.
        longest: tokens of the longest sequence.
        shares: for each process, its micro-batches, each a list of sequences; a share may be empty.
    """

    step: int
    epoch: float
    rows: list[int]
    num_tokens: int
    num_targets: int
    longest: int
    shares: list[list[list[Unit]]]


class Plan:
    """All steps of a run."""

    def __init__(
        self, sequences: SequenceTable, train: TrainConfig, world_size: int, micro_batch_tokens: int,
        beginnings_of: Callable[[int], Sequence[Ints]] | None = None, cost: TokenCost = TokenCost(),
    ) -> None:  # fmt: skip
        """
        Args:
            sequences: of all rows.
            train: batch size, epochs or steps, seed.
            world_size: processes.
            micro_batch_tokens: the most tokens in a micro-batch (a longer sequence stands alone).
            beginnings_of: the tokens with which each sequence of a row may share a prefix with others; None where none
                are shared.
            cost: of tokens beside each other, by which sequences are dealt to processes.
        """
        self.beginnings_of, self.cost = beginnings_of, cost
        self.sequences = sequences
        self.batch_size, self.seed = train.batch_size, train.seed
        self.world_size, self.micro_batch_tokens = world_size, micro_batch_tokens
        self.steps_per_epoch = math.ceil(sequences.num_rows / train.batch_size)
        self.total_steps = self.count_steps(sequences.num_rows, train)
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None

    @staticmethod
    def count_steps(num_rows: int, train: TrainConfig) -> int:
        """The optimizer steps of a run over `num_rows` rows; the last step of an epoch may have fewer examples."""
        return train.max_steps or max(1, round(train.epochs * math.ceil(num_rows / train.batch_size)))

    def step(self, step: int) -> StepPlan:
        """The plan of `step`, counted from 1."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        rows = self._permutation(epoch)[place * self.batch_size : (place + 1) * self.batch_size]
        members = self.sequences.of_rows(rows)
        first = self.sequences.first
        units = [
            Unit(example, row, document)
            for example, row in enumerate(rows.tolist())
            for document in range(first[row + 1] - first[row])
        ]
        lengths, trained = self.sequences.num_tokens[members].tolist(), self.sequences.num_targets[members].tolist()
        prefixes = (
            []
            if self.beginnings_of is None
            else find_prefixes([beginning for row in rows.tolist() for beginning in self.beginnings_of(row)], lengths)
        )
        shares = deal(lengths, trained, self.world_size, prefixes, self.cost)
        return StepPlan(
            step=step,
            epoch=epoch + min(1.0, (place + 1) * self.batch_size / self.sequences.num_rows),
            rows=rows.tolist(),
            num_tokens=sum(lengths),
            num_targets=sum(trained),
            longest=max(lengths),
            shares=[self._micro_batches(units, lengths, share, prefixes) for share in shares],
        )

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        """The order of all rows in `epoch`, from (seed, epoch) alone."""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.sequences.num_rows)
        return self._order[1]

    def _micro_batches(
        self, units: Sequence[Unit], lengths: Sequence[int], share: Sequence[int], prefixes: Sequence[SharedPrefix]
    ) -> list[list[Unit]]:
        """Those of one process's `share` (places among `units`), grouped."""
        place_in_share = {place: index for index, place in enumerate(share)}
        inside = (
            (prefix.length, tuple(place_in_share[place] for place in prefix.members if place in place_in_share))
            for prefix in prefixes
        )
        shared = [SharedPrefix(length, members) for length, members in inside if len(members) > 1]
        groups = fill([lengths[place] for place in share], self.micro_batch_tokens, shared)
        return [[units[share[index]] for index in group] for group in groups]


def deal(
    lengths: Sequence[int], trained: Sequence[int], world_size: int, prefixes: Sequence[SharedPrefix] = (),
    cost: TokenCost = TokenCost(),
) -> list[list[int]]:  # fmt: skip
    """Split a step's sequences over the processes so that each has about the same to compute.

    The dearest first, each to the process that is then the least loaded: Graham's LPT rule, at most a third above
    the best possible. A shared prefix costs a process once, with the first of its sequences.

    Args:
        lengths: tokens of each sequence.
        trained: trained tokens of each.
        world_size: processes.
        prefixes: which begin with the same tokens.
        cost: of tokens beside each other.

    Returns:
        For each process the places of its sequences in `lengths`.
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
