"""The plan: which examples make each optimizer step, and how they are dealt to processes and micro-batches.

A step is defined by its examples. The plan is a pure function of the row lengths, the settings and the step, so every
process knows all of it without a word to the others, and a resumed run goes on exactly where it was.

    plan = Plan(num_tokens, num_trained, train_config, world_size=2, micro_batch_tokens=4096)
    plan.step(17).shares[rank]      # this process's micro-batches, as lists of rows
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmtune.config import TrainConfig
from lmtune.data.packing import fill

Int32 = npt.NDArray[np.int32]


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
        self, num_tokens: Int32, num_trained: Int32, train: TrainConfig, world_size: int, micro_batch_tokens: int
    ) -> None:
        """
        Args:
            num_tokens: `[rows]`, tokens of each row.
            num_trained: `[rows]`, trained tokens of each row.
            train: batch size, epochs or steps, seed.
            world_size: processes.
            micro_batch_tokens: the most tokens in a micro-batch (a longer row stands alone).
        """
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
        return StepPlan(
            step=step,
            epoch=epoch + min(1.0, (place + 1) * self.batch_size / len(self.num_tokens)),
            rows=rows.tolist(),
            num_tokens=int(self.num_tokens[rows].sum()),
            num_trained=int(self.num_trained[rows].sum()),
            shares=[self._micro_batches(share) for share in deal(rows, self.num_tokens[rows], self.world_size)],
        )

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        """The order of all rows in `epoch`, from (seed, epoch) alone."""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.num_tokens))
        return self._order[1]

    def _micro_batches(self, rows: list[int]) -> list[list[int]]:
        groups = fill([int(self.num_tokens[row]) for row in rows], self.micro_batch_tokens)
        return [[rows[index] for index in group] for group in groups]


def deal(rows: npt.NDArray[np.int64], lengths: Int32, world_size: int) -> list[list[int]]:
    """Split a step's rows over the processes so that their tokens are about equal.

    The longest row first, each to the process that has the fewest tokens so far: Graham's LPT rule, at most a third
    above the best possible.
    """
    if world_size == 1:
        return [rows.tolist()]
    shares: list[list[int]] = [[] for _ in range(world_size)]
    load = [0] * world_size
    for index in np.argsort(-lengths, kind="stable"):
        rank = load.index(min(load))
        shares[rank].append(int(rows[index]))
        load[rank] += int(lengths[index])
    return shares
