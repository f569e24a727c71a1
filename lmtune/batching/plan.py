"""The plan: which examples make each optimizer step, and which rank computes what in which micro-batch.

A step is defined by its examples. The plan is a pure function of the lengths, the settings and the step, so every
rank knows all of it without communication, and a resumed run goes on exactly where it was. What is assigned is a unit:
the sequences of an example that the objective needs in one micro-batch, by default each by itself.

    planner = Planner(data.sequences, train_config, world_size=2, micro_batch_tokens=4096)
    planner.step(17).micro_batches[rank]      # lists of units
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmtune.batching.packing import pack_bins
from lmtune.batching.prefixes import Ints, SharedPrefix, common_length, find_prefixes
from lmtune.config.schema import TrainConfig
from lmtune.data.sequences import SequenceTable


@dataclass(frozen=True)
class TokenCost:
    """What makes one token more expensive than another, as parts of what each costs.

    Attributes:
        before: for each token before it in its sequence: attention.
        target: if it is a target: the output head.
    """

    before: float = 0.0
    target: float = 0.0


class Unit(NamedTuple):
    """Sequences that share a micro-batch: some of row `row`, which is number `example` of the step's examples."""

    example: int
    row: int
    sequences: tuple[int, ...]


@dataclass(frozen=True)
class Totals:
    """What a step's examples add up to, over all ranks; an objective's denominator is made of these.

    Attributes:
        weight: the sum of the examples' weights: their number where all count alike.
        weighted_targets: the sum of the targets, each times the weight of its example.
    """

    examples: int
    sequences: int
    tokens: int
    targets: int
    weight: float
    weighted_targets: float

    @classmethod
    def of(cls, table: SequenceTable, rows: Sequence[int] | npt.NDArray[np.int64]) -> Totals:
        """What `rows` of `table` add up to."""
        members = table.of_rows(rows)
        tokens, targets = table.num_tokens[members], table.num_targets[members]
        weight: float = len(rows)
        weighted: float = int(targets.sum())
        if table.weights is not None:
            weight, weighted = float(table.weights[rows].sum()), float(table.weights[table.row[members]] @ targets)
        return cls(len(rows), len(members), int(tokens.sum()), int(targets.sum()), weight, weighted)


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step.

    Attributes:
        step: counted from 1.
        epoch: how much of the data was seen after this step, in epochs.
        rows: the examples of the step, over all ranks, as indices into the data.
        totals: of these examples.
        longest: tokens of the longest unit.
        micro_batches: for each rank its micro-batches, each a list of units; a rank may have none.
    """

    step: int
    epoch: float
    rows: list[int]
    totals: Totals
    longest: int
    micro_batches: list[list[list[Unit]]]


def each_alone(num_sequences: int) -> Sequence[Sequence[int]]:
    """Units of one sequence each: what an objective over single sequences needs."""
    return [(sequence,) for sequence in range(num_sequences)]


class Planner:
    """All steps of a run."""

    def __init__(
        self, sequences: SequenceTable, train: TrainConfig, world_size: int, micro_batch_tokens: int,
        shareable_of: Callable[[int], Sequence[Ints]] | None = None, cost: TokenCost = TokenCost(),
        units_of: Callable[[int], Sequence[Sequence[int]]] = each_alone,
    ) -> None:  # fmt: skip
        """
        Args:
            sequences: of all rows.
            train: batch size, epochs or steps, seed.
            world_size: ranks.
            micro_batch_tokens: the most tokens in a micro-batch (a longer unit stands alone).
            shareable_of: the tokens with which each sequence of a row may share a prefix with others; None where none
                are shared.
            cost: of tokens beside each other, by which units are assigned to ranks.
            units_of: which of a row's sequences, of which there are so many, share a micro-batch.
        """
        self._shareable_of, self._cost, self._units_of = shareable_of, cost, units_of
        self.sequences, self.train = sequences, train
        self.world_size, self.micro_batch_tokens = world_size, micro_batch_tokens
        self.steps_per_epoch = math.ceil(sequences.rows_per_epoch / train.batch_size)
        self.total_steps = self.count_steps(sequences.rows_per_epoch, train)
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None

    @staticmethod
    def count_steps(num_rows: int, train: TrainConfig) -> int:
        """The steps of a run with epochs of `num_rows` examples; the last step of an epoch may have fewer examples."""
        return train.max_steps or max(1, round(train.epochs * math.ceil(num_rows / train.batch_size)))

    def with_budget(self, micro_batch_tokens: int) -> Planner:
        """The same steps in micro-batches of another size."""
        return Planner(
            self.sequences, self.train, self.world_size, micro_batch_tokens, self._shareable_of, self._cost,
            self._units_of,
        )  # fmt: skip

    def step(self, number: int) -> StepPlan:
        """The plan of step `number`, counted from 1."""
        epoch, place = divmod(number - 1, self.steps_per_epoch)
        size, table = self.train.batch_size, self.sequences
        rows = self._permutation(epoch)[place * size : (place + 1) * size]
        units, members, begins = self._units(rows)
        tokens, targets = table.num_tokens[members], table.num_targets[members]
        lengths, shareable = np.add.reduceat(tokens, begins).tolist(), None
        if self._shareable_of is not None:
            shareable = self._share_within(units, lengths, self._shareable_of)
        prefixes = [] if shareable is None else find_prefixes(shareable, lengths)
        of_units = np.add.reduceat(targets, begins).tolist()
        shares = assign_to_ranks(lengths, of_units, self.world_size, prefixes, self._cost)
        return StepPlan(
            step=number,
            epoch=epoch + min(1.0, (place + 1) * size / table.rows_per_epoch),
            rows=rows.tolist(),
            totals=Totals.of(table, rows),
            longest=max(lengths),
            micro_batches=[self._bins(units, lengths, share, prefixes) for share in shares],
        )

    def _units(self, rows: npt.NDArray[np.int64]) -> tuple[list[Unit], list[int], list[int]]:
        """The units of a step's rows, the numbers of their sequences `[S]`, and where each unit begins among these."""
        first = self.sequences.first
        units: list[Unit] = []
        members: list[int] = []
        begins: list[int] = []
        places = zip(rows.tolist(), first[rows].tolist(), first[rows + 1].tolist(), strict=True)
        for example, (row, begin, end) in enumerate(places):
            for group in self._units_of(end - begin):
                units.append(Unit(example, row, tuple(group)))
                begins.append(len(members))
                members += [begin + sequence for sequence in group]
        return units, members, begins

    @staticmethod
    def _share_within(
        units: Sequence[Unit], lengths: list[int], shareable_of: Callable[[int], Sequence[Ints]]
    ) -> list[Ints]:  # fmt: skip
        """What each unit may share with others; tokens that its own sequences share are taken off its length."""
        of_row = {row: shareable_of(row) for row in dict.fromkeys(unit.row for unit in units)}
        shareable = []
        for index, unit in enumerate(units):
            prefix, *others = [of_row[unit.row][sequence] for sequence in unit.sequences]
            for other in others:
                prefix = prefix[: common_length(prefix, other)]
            lengths[index] -= len(others) * len(prefix)
            shareable.append(prefix)
        return shareable

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        """The rows of `epoch` in their order, from (seed, epoch) alone."""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self.sequences.epoch_rows(self.train.seed, epoch)
        return self._order[1]

    def _bins(
        self, units: Sequence[Unit], lengths: Sequence[int], share: Sequence[int], prefixes: Sequence[SharedPrefix]
    ) -> list[list[Unit]]:
        """The micro-batches of one rank's `share` (places among `units`)."""
        place_in_share = {place: index for index, place in enumerate(share)}
        inside = (
            (prefix.length, tuple(place_in_share[place] for place in prefix.members if place in place_in_share))
            for prefix in prefixes
        )
        shared = [SharedPrefix(length, members) for length, members in inside if len(members) > 1]
        bins = pack_bins([lengths[place] for place in share], self.micro_batch_tokens, shared)
        return [[units[share[index]] for index in members] for members in bins]


def assign_to_ranks(
    lengths: Sequence[int], targets: Sequence[int], world_size: int, prefixes: Sequence[SharedPrefix] = (),
    cost: TokenCost = TokenCost(),
) -> list[list[int]]:  # fmt: skip
    """Split a step's units over the ranks so that each has about the same to compute.

    The most expensive first, each to the rank that is then the least loaded: Graham's LPT rule, at most a third above
    the best possible. A shared prefix costs a rank once, with the first of its units.

    Args:
        lengths, targets: tokens and targets of each unit.
        world_size: ranks.
        prefixes: which begin with the same tokens.
        cost: of tokens beside each other.

    Returns:
        For each rank the places of its units in `lengths`.
    """
    if world_size == 1:
        return [list(range(len(lengths)))]

    def work(tokens: int, before: int = 0) -> float:
        return tokens * (1 + cost.before * (tokens / 2 + before))  # of its own tokens each sees half

    prefix_of = {place: index for index, prefix in enumerate(prefixes) for place in prefix.members}
    first = {index: work(prefix.length) for index, prefix in enumerate(prefixes)}
    own = []
    for place, (length, read) in enumerate(zip(lengths, targets, strict=True)):
        shared = prefixes[prefix_of[place]].length if place in prefix_of else 0
        own.append(work(length - shared, shared) + read * cost.target)
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
