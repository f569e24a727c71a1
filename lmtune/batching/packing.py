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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lmtune.batching.prefixes import SharedPrefix, beginning, find_prefixes

Ints = npt.NDArray[np.int64]
_JOINED_GAPS = (32, 128, 512)  # places that predict nothing, computed along between two that do
_MOST_KEYS = 12  # of label positions, as a multiple of all tokens
_PREFIX_AGAIN = 1 / 8  # of a prefix token's memory: its keys and values, which each document behind it keeps


@dataclass(frozen=True)
class Span:
    """Some queries and the keys before and at them: all of run `prefix`, if any, and the first `keys` of `run`.

    The last query is at the place of the last key.
    """

    queries: int
    prefix: int | None
    run: int
    keys: int


@dataclass(frozen=True)
class SegmentLayout:
    """Which tokens of a pack may see which: runs of tokens, each behind another run or behind none.

    Attributes:
        lengths: tokens of each run, in the order they lie; they sum to T.
        prefixes: for each run the index of the run that precedes it in its document, or None. A prefix has none.
        read_positions: places that predict a trained token and a few between them, ascending; empty if nobody asks
            for `read_spans`.
    """

    lengths: tuple[int, ...]
    prefixes: tuple[int | None, ...]
    read_positions: tuple[int, ...] = ()

    @classmethod
    def of_segments(cls, *lengths: int) -> SegmentLayout:
        """Documents that share nothing."""
        return cls(lengths, (None,) * len(lengths))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each run begins."""
        return tuple(np.concatenate([[0], np.cumsum(self.lengths)])[:-1].tolist())

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Every token as a query: one span a run."""
        return tuple(
            Span(length, prefix, run, length)
            for run, (length, prefix) in enumerate(zip(self.lengths, self.prefixes, strict=True))
        )

    @cached_property
    def read_spans(self) -> tuple[Span, ...]:
        """The label positions as queries: a span for each unbroken row of them in a run."""
        places = np.array(self.read_positions, dtype=np.int64)
        runs = np.searchsorted(np.array(self.starts), places, side="right") - 1
        breaks = np.flatnonzero((np.diff(places) != 1) | (np.diff(runs) != 0)) + 1
        return tuple(
            Span(len(some), self.prefixes[run], run, int(some[-1]) - self.starts[run] + 1)
            for some in np.split(places, breaks)
            for run in [int(runs[np.searchsorted(places, some[0])])]
        )

    @cached_property
    def derived(self) -> dict[Any, Any]:
        """What kernels work out from this layout, kept with it so that each does so once."""
        return {}

    @property
    def is_plain(self) -> bool:
        """Whether no prefix is shared."""
        return all(prefix is None for prefix in self.prefixes)


@dataclass(frozen=True)
class MicroBatch:
    """The tensors of some sequences. T tokens in all, N of them trained, of a step of E examples.

    Attributes:
        input_ids: `[1, T]`.
        position_ids: `[1, T]`, from 0 within each document.
        layout: which tokens belong together.
        predicting: `[N]`, the positions whose output predicts a trained token: the one before it in its document.
        read_positions: `[P]`, the different ones among them, ascending, and the few between neighbours.
        read_index: `[N]`, where in `read_positions` each predictor is.
        targets: `[N]`, the trained tokens.
        examples: `[N]`, which of the E examples each target belongs to; others of its targets may be elsewhere.
        num_examples: E.
        num_tokens: tokens of the sequences; T is less by what shared prefixes save.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: SegmentLayout
    predicting: torch.Tensor
    read_positions: torch.Tensor
    read_index: torch.Tensor
    targets: torch.Tensor
    examples: torch.Tensor
    num_examples: int
    num_tokens: int

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`; does not wait for the copy if the tensors are pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        """The same in page-locked memory, from which a GPU copies by itself."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        return replace(
            self, input_ids=change(self.input_ids), position_ids=change(self.position_ids),
            predicting=change(self.predicting), read_positions=change(self.read_positions),
            read_index=change(self.read_index), targets=change(self.targets), examples=change(self.examples),
        )  # fmt: skip


def pack(rows: Sequence[Any], share_prefixes: bool = False) -> MicroBatch:
    """Lay the documents of `rows` (`TokenizedExample`s) end to end.

    Args:
        rows: E examples, each with `documents` that have `input_ids[t]` and `trained[t]`.
        share_prefixes: whether a beginning that several documents have in common is laid down once.
    """
    documents = [document for row in rows for document in row.sequences]
    examples = [index for index, row in enumerate(rows) for _ in row.sequences]
    return pack_sequences(documents, examples, len(rows), share_prefixes)


def pack_sequences(
    sequences: Sequence[Any], examples: Sequence[int], num_examples: int, share_prefixes: bool = False
) -> MicroBatch:
    """Lay sequences end to end, of which some may belong to the same example and others of it lie elsewhere.

    Args:
        sequences: each with `input_ids[t]` and `trained[t]`.
        examples: for each the number of its example.
        num_examples: of the step, or whatever they are numbered in.
        share_prefixes: whether a beginning that several have in common is laid down once.
    """
    documents = [
        (example, np.asarray(sequence.input_ids, dtype=np.int64), np.asarray(sequence.loss_mask, dtype=bool))
        for example, sequence in zip(examples, sequences, strict=True)
    ]
    shared = []
    if share_prefixes:
        shared = find_prefixes(
            [beginning(ids, trained) for _, ids, trained in documents], [len(ids) for _, ids, _ in documents]
        )
    grouped = {index for group in shared for index in group.members}
    alone = [SharedPrefix(0, (index,)) for index in range(len(documents)) if index not in grouped]
    build = _Builder()
    for group in [*shared, *alone]:
        prefix = build.prefix(documents[group.members[0]][1][: group.length]) if group.length else None
        for index in group.members:
            build.document(*documents[index], prefix)
    return build.finish(num_examples, sum(len(ids) for _, ids, _ in documents))


class _Builder:
    """Collects the runs of a micro-batch."""

    def __init__(self) -> None:
        self.runs: list[Ints] = []
        self.positions: list[Ints] = []
        self.prefixes: list[int | None] = []
        self.predicting: list[Ints] = []
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
        if trained[0]:
            raise ValueError("the first token of a document cannot be trained: nothing comes before it")
        labels = np.flatnonzero(trained)
        own = labels - shared  # the label's place among the document's own tokens
        self.predicting.append(np.where(own > 0, self.num_laid + own - 1, end - 1))
        self.targets.append(ids[labels])
        self.examples.append(np.full(len(labels), example, dtype=np.int64))
        self._run(ids[shared:], shared, run)

    def finish(self, num_examples: int, num_tokens: int) -> MicroBatch:
        """The tensors."""
        predicting = np.concatenate(self.predicting)
        lengths = tuple(len(run) for run in self.runs)
        positions = _joined(np.unique(predicting), np.cumsum([0, *lengths]))
        places = np.searchsorted(positions, predicting)
        return MicroBatch(
            input_ids=torch.from_numpy(np.concatenate(self.runs))[None],
            position_ids=torch.from_numpy(np.concatenate(self.positions))[None],
            layout=SegmentLayout(lengths, tuple(self.prefixes), tuple(positions.tolist())),
            predicting=torch.from_numpy(predicting),
            read_positions=torch.from_numpy(positions),
            read_index=torch.from_numpy(places),
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


def _joined(positions: Ints, edges: Ints) -> Ints:
    """`positions` and those in short gaps between them, since each unbroken row of them attends by itself.

    A row's keys are all before it, so many short rows of one long document have many times its keys: then longer gaps
    are filled too.

    Args:
        positions: `[P]`, ascending.
        edges: where runs begin, and the end; no gap across one is filled.
    """
    runs = np.searchsorted(edges, positions, side="right")
    gaps = np.where(np.diff(runs) == 0, np.diff(positions) - 1, edges[-1])
    for longest in (*_JOINED_GAPS, edges[-1] - 1):
        last = np.append(gaps > longest, True)  # of an unbroken row
        if (positions - edges[runs - 1] + 1)[last].sum() <= _MOST_KEYS * edges[-1]:
            break
    short = np.flatnonzero((gaps > 0) & ~last[:-1])
    between = [np.arange(positions[place] + 1, positions[place + 1]) for place in short]
    return np.sort(np.concatenate([positions, *between]))


def fill(lengths: Sequence[int], budget_tokens: int, prefixes: Sequence[SharedPrefix] = ()) -> list[list[int]]:
    """Sort items into as few groups of at most `budget_tokens` as best-fit decreasing finds.

    An item longer than the budget gets a group of its own: a row is never cut and never dropped here. Items that share
    a prefix go together, the prefix counted once, and for each of them what attention keeps of it; as many groups as
    they need each hold it.

    Args:
        lengths: tokens of each item, its prefix included.
        budget_tokens: the most tokens in a group.
        prefixes: which items begin with the same tokens.

    Returns:
        Groups of indices into `lengths`, largest item first; deterministic.
    """
    shared = {index for prefix in prefixes for index in prefix.members}
    items = [([index], length) for index, length in enumerate(lengths) if index not in shared]
    for prefix in prefixes:
        again = int(prefix.length * _PREFIX_AGAIN)
        own = [lengths[index] - prefix.length + again for index in prefix.members]
        for group in _best_fit(own, max(1, budget_tokens - prefix.length)):
            members = [prefix.members[place] for place in group]
            items.append((members, prefix.length + sum(own[place] for place in group)))
    items.sort(key=lambda item: min(item[0]))
    groups = _best_fit([length for _, length in items], budget_tokens)
    return [[index for place in group for index in items[place][0]] for group in groups]


def _best_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing: each item, the largest first, into the fullest group that still has room for it."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, group), ascending
    for index in order:
        place = bisect.bisect_left(room, (lengths[index], -1))
        if place < len(room):
            left, group = room.pop(place)
        else:
            left, group = max(budget, lengths[index]), len(groups)
            groups.append([])
        groups[group].append(index)
        bisect.insort(room, (left - lengths[index], group))
    return groups
