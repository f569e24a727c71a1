"""Rows as sequences, each of which is computed by itself: a template that drops earlier thoughts gives several a row.

sequences.num_tokens[sequences.of_rows([7, 3])]      # of row 7's sequences, then of row 3's
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from lmtune.data.mixing import Mixture

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SequenceTable:
    """The S sequences of N rows, row after row.

    Attributes:
        num_tokens, num_targets: int32 `[S]`.
        first: int64 `[N + 1]`, where each row's sequences begin, and where the last one's end.
        weights: float64 `[N]`, how much each row counts in the loss; None where all count alike.
        mixture: which rows are in an epoch, where not all are.
    """

    num_tokens: Int32
    num_targets: Int32
    first: Int64
    weights: Float64 | None = None
    mixture: Mixture | None = None

    @classmethod
    def one_each(cls, num_tokens: Int32, num_targets: Int32) -> SequenceTable:
        """Rows of one sequence."""
        return cls(num_tokens, num_targets, np.arange(len(num_tokens) + 1))

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.first) - 1

    @property
    def rows_per_epoch(self) -> int:
        """Examples of an epoch: all rows, unless sources are mixed."""
        return self.num_rows if self.mixture is None else self.mixture.num_rows

    @property
    def tokens_per_epoch(self) -> float:
        """Tokens of an epoch, on average."""
        if self.mixture is None:
            return float(self.num_tokens.sum())
        of_rows = np.add.reduceat(self.num_tokens, self.first[:-1], dtype=np.int64)
        sizes = np.bincount(self.mixture.source)
        means = np.bincount(self.mixture.source, weights=of_rows) / sizes
        return float(means @ np.array(self.mixture.taken))

    def epoch_rows(self, seed: int, epoch: int) -> Int64:
        """The rows of an epoch in their order, from (seed, epoch) alone."""
        order: Int64 = np.random.default_rng([seed, epoch]).permutation(self.rows_per_epoch)
        return order if self.mixture is None else self.mixture.rows(seed, epoch)[order]

    @property
    def longest(self) -> int:
        """Tokens of the longest one: what a forward pass must hold at the least."""
        return int(self.num_tokens.max())

    @cached_property
    def row(self) -> Int64:
        """int64 `[S]`, the row of each."""
        return np.repeat(np.arange(self.num_rows), np.diff(self.first))

    @cached_property
    def place_in_row(self) -> Int64:
        """int64 `[S]`, each one's number within its row, from 0."""
        return np.arange(len(self.row)) - self.first[self.row]

    def of_rows(self, rows: Sequence[int] | Int64) -> Int64:
        """int64, the sequences of `rows`, in the order of these."""
        rows = np.asarray(rows, dtype=np.int64)
        counts = self.first[rows + 1] - self.first[rows]
        before = np.cumsum(counts) - counts
        return np.repeat(self.first[rows] - before, counts) + np.arange(int(counts.sum()))

    def select(self, rows: Int64) -> SequenceTable:
        """Those of `rows` alone."""
        chosen = self.of_rows(rows)
        first = np.concatenate([[0], np.cumsum(self.first[rows + 1] - self.first[rows])])
        weights = None if self.weights is None else self.weights[rows]
        return SequenceTable(self.num_tokens[chosen], self.num_targets[chosen], first, weights)
