"""Packing: rows of any length laid end to end in one sequence, without a single padding token.

    rows      [The cat sat] [Hello]           input_ids    [The cat sat Hello]
    position_ids restart at each document:    position_ids [ 0   1   2    0  ]

Documents that begin with the same tokens (a common system prompt, one question with several answers) share them: the
prefix is laid down once, and each document's own tokens follow with position ids that go on from it.

    rows      [Be brief. Hi] [Be brief. Bye]  input_ids    [Be brief. Hi Bye]
                                              position_ids [ 0   1    2  2  ]

`pack` turns token rows into the tensors of one micro-batch; `fill` decides which rows share a micro-batch.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_SHORTEST_PREFIX = 16  # tokens; a shorter common beginning is not worth the bookkeeping
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """Which tokens of a pack may see which: runs of tokens, each behind another run or behind none.

    Attributes:
        lengths: tokens of each run, in the order they lie; they sum to T.
        prefixes: for each run the index of the run that precedes it in its document, or None. A prefix has none.
    """

    lengths: tuple[int, ...]
    prefixes: tuple[int | None, ...]

    @classmethod
    def of_documents(cls, *lengths: int) -> Layout:
        """Documents that share nothing."""
        return cls(lengths, (None,) * len(lengths))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each run begins."""
        return tuple(np.concatenate([[0], np.cumsum(self.lengths)])[:-1].tolist())

    @property
    def is_plain(self) -> bool:
        """Whether no prefix is shared."""
        return all(prefix is None for prefix in self.prefixes)


@dataclass(frozen=True)
class MicroBatch:
    """The tensors of some rows. T tokens in all, N of them trained, E examples.

    Attributes:
        input_ids: `[1, T]`.
        position_ids: `[1, T]`, from 0 within each document.
        layout: which tokens belong together.
        predictors: `[N]`, the positions whose output predicts a trained token: the one before it in its document.
        targets: `[N]`, the trained tokens.
        examples: `[N]`, which of the E examples each target belongs to.
        num_examples: E.
        num_tokens: tokens of the rows; T is less by what shared prefixes save.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: Layout
    predictors: torch.Tensor
    targets: torch.Tensor
    examples: torch.Tensor
    num_examples: int
    num_tokens: int

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`."""
        names = ("input_ids", "position_ids", "predictors", "targets", "examples")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def pack(rows: Sequence[Any], share_prefixes: bool = False) -> MicroBatch:
    """Lay the documents of `rows` (`TokenizedExample`s) end to end.

    Args:
        rows: E examples, each with `documents` that have `input_ids[t]` and `trained[t]`.
        share_prefixes: whether a beginning that several documents have in common is laid down once.
    """
    documents = [
        (index, np.asarray(document.input_ids, dtype=np.int64), np.asarray(document.trained, dtype=bool))
        for index, row in enumerate(rows)
        for document in row.documents
    ]
    groups = _common_beginnings([(ids, trained) for _, ids, trained in documents]) if share_prefixes else []
    grouped = {index for _, members in groups for index in members}
    groups = [*groups, *((0, [index]) for index in range(len(documents)) if index not in grouped)]
    build = _Builder()
    for length, members in groups:
        prefix = build.prefix(documents[members[0]][1][:length]) if length else None
        for index in members:
            build.document(*documents[index], prefix)
    return build.finish(len(rows), sum(len(ids) for _, ids, _ in documents))


class _Builder:
    """Collects the runs of a micro-batch."""

    def __init__(self) -> None:
        self.runs: list[Ints] = []
        self.positions: list[Ints] = []
        self.prefixes: list[int | None] = []
        self.predictors: list[Ints] = []
        self.targets: list[Ints] = []
        self.examples: list[Ints] = []
        self.num_laid = 0

    def prefix(self, ids: Ints) -> tuple[int, int, int]:
        """Lay down a shared beginning; returns its run, its length and where it ends."""
        self._run(ids, 0, None)
        return len(self.runs) - 1, len(ids), self.num_laid

    def document(
        self, example: int, ids: Ints, trained: npt.NDArray[np.bool_], prefix: tuple[int, int, int] | None
    ) -> None:
        """Lay down one document, or what follows its prefix."""
        run, shared, end = prefix or (None, 0, self.num_laid)
        labels = np.flatnonzero(trained)
        own = labels - shared  # the label's place among the document's own tokens
        self.predictors.append(np.where(own > 0, self.num_laid + own - 1, end - 1))
        self.targets.append(ids[labels])
        self.examples.append(np.full(len(labels), example, dtype=np.int64))
        self._run(ids[shared:], shared, run)

    def finish(self, num_examples: int, num_tokens: int) -> MicroBatch:
        """The tensors."""
        return MicroBatch(
            input_ids=torch.from_numpy(np.concatenate(self.runs))[None],
            position_ids=torch.from_numpy(np.concatenate(self.positions))[None],
            layout=Layout(tuple(len(run) for run in self.runs), tuple(self.prefixes)),
            predictors=torch.from_numpy(np.concatenate(self.predictors)),
            targets=torch.from_numpy(np.concatenate(self.targets)),
            examples=torch.from_numpy(np.concatenate(self.examples)),
            num_examples=num_examples,
            num_tokens=num_tokens,
        )

    def _run(self, ids: Ints, first_position: int, prefix: int | None) -> None:
        self.runs.append(ids)
        self.positions.append(np.arange(first_position, first_position + len(ids)))
        self.prefixes.append(prefix)
        self.num_laid += len(ids)


def _common_beginnings(documents: Sequence[tuple[Ints, npt.NDArray[np.bool_]]]) -> list[tuple[int, list[int]]]:
    """Groups of documents worth laying down behind a common prefix, as (prefix length, members).

    Sorted by their tokens, documents with a common beginning are neighbours; a neighbour joins a group if that saves
    more tokens than leaving it out. A prefix holds no trained token, and each document keeps one token of its own.
    """
    order = sorted(range(len(documents)), key=lambda index: documents[index][0].tobytes())
    limit = [min(int(np.argmax(trained)), len(ids) - 1) for ids, trained in documents]
    groups: list[tuple[int, list[int]]] = []
    for index in order:
        if groups:
            length, members = groups[-1]
            common = _common_length(documents[members[-1]][0], documents[index][0], min(length, limit[index]))
            if common >= _SHORTEST_PREFIX and len(members) * common > (len(members) - 1) * length:
                groups[-1] = common, [*members, index]
                continue
        groups.append((limit[index], [index]))
    return [(length, members) for length, members in groups if len(members) > 1]


def _common_length(one: Ints, other: Ints, limit: int) -> int:
    """How many of the first `limit` tokens are equal."""
    size = min(limit, len(one), len(other))
    different = np.flatnonzero(one[:size] != other[:size])
    return int(different[0]) if len(different) else size


def fill(lengths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Sort items into as few groups of at most `budget_tokens` as best-fit decreasing finds.

    An item longer than the budget gets a group of its own: a row is never cut and never dropped here.

    Args:
        lengths: tokens of each item.
        budget_tokens: the most tokens in a group.

    Returns:
        Groups of indices into `lengths`, largest item first; deterministic.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, group), ascending
    for index in order:
        place = bisect.bisect_left(room, (lengths[index], -1))
        if place < len(room):
            left, group = room.pop(place)
        else:
            left, group = max(budget_tokens, lengths[index]), len(groups)
            groups.append([])
        groups[group].append(index)
        bisect.insort(room, (left - lengths[index], group))
    return groups
