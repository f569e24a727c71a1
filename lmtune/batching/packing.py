"""Packing: sequences of any length end to end in one row, without a single padding token.

    sequences [The cat sat] [Hello]           input_ids    [The cat sat Hello]
    position_ids restart at each sequence:    position_ids [ 0   1   2    0  ]

Sequences that begin with the same tokens (a common system prompt, one question with several answers) share them: the
prefix is there once, and each sequence's own tokens follow with position ids that go on from it.

    sequences [Be brief. Hi] [Be brief. Bye]  input_ids    [Be brief. Hi Bye]
                                              position_ids [ 0   1    2  2  ]

`pack` makes the tensors of one micro-batch; `pack_bins` decides which sequences share a micro-batch.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from lmtune.batching.prefixes import SharedPrefix, find_prefixes, shareable_prefix
from lmtune.data.types import TokenSequence

Ints = npt.NDArray[np.int64]
Reads = Literal["targets", "last_token"]  # where outputs are read: before each target, or at each sequence's end
_JOINED_GAPS = (32, 128, 512)  # positions that predict nothing, computed along between two that do
_MOST_KEYS = 12  # of read positions, as a multiple of all tokens
_PREFIX_AGAIN = 1 / 8  # of a prefix token's memory: its keys and values, which each sequence behind it keeps


@dataclass(frozen=True)
class Span:
    """Some queries and the keys before and at them: all of segment `prefix`, if any, and the first `keys` of `segment`.

    The last query is at the position of the last key.
    """

    queries: int
    prefix: int | None
    segment: int
    keys: int


# which keys the spans see one after another (None: all in their order), where each span's begin, the most of a span
Boundaries = tuple[torch.Tensor | None, tuple[torch.Tensor, torch.Tensor], tuple[int, int]]


@dataclass
class Derived:
    """What attention kernels make of a layout: made once, used in every layer.

    Attributes:
        masks: by their size, window, type and device.
        boundaries: by whether every token is a query, and the device.
        window: the sliding window or chunk that a layer asked for, if any did.
        by_blocks: whether a layer has scores that only plain operations compute.
    """

    masks: dict[tuple[object, ...], torch.Tensor] = field(default_factory=dict)
    boundaries: dict[tuple[bool, torch.device], Boundaries] = field(default_factory=dict)
    window: int | None = None
    by_blocks: bool = False


@dataclass(frozen=True)
class SegmentLayout:
    """Which tokens of a pack may see which: segments of tokens, each behind another segment or behind none.

    Attributes:
        lengths: tokens of each segment, in their order; they sum to T.
        prefixes: for each segment the index of the one that precedes it in its sequence, or None.
        read_positions: positions where outputs are read and a few between them, ascending.
    """

    lengths: tuple[int, ...]
    prefixes: tuple[int | None, ...]
    read_positions: tuple[int, ...] = ()

    @classmethod
    def of_segments(cls, *lengths: int) -> SegmentLayout:
        """Sequences that share nothing."""
        return cls(lengths, (None,) * len(lengths))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each segment begins."""
        return tuple(np.concatenate([[0], np.cumsum(self.lengths)])[:-1].tolist())

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Every token as a query: one span a segment."""
        return tuple(
            Span(length, prefix, segment, length)
            for segment, (length, prefix) in enumerate(zip(self.lengths, self.prefixes, strict=True))
        )

    @cached_property
    def read_spans(self) -> tuple[Span, ...]:
        """The read positions as queries: a span for each unbroken row of them in a segment."""
        positions = np.array(self.read_positions, dtype=np.int64)
        segments = np.searchsorted(np.array(self.starts), positions, side="right") - 1
        breaks = np.flatnonzero((np.diff(positions) != 1) | (np.diff(segments) != 0)) + 1
        return tuple(
            Span(len(some), self.prefixes[segment], segment, int(some[-1]) - self.starts[segment] + 1)
            for some in np.split(positions, breaks)
            for segment in [int(segments[np.searchsorted(positions, some[0])])]
        )

    @cached_property
    def derived(self) -> Derived:
        """What kernels make of this layout."""
        return Derived()

    @property
    def is_plain(self) -> bool:
        """Whether no prefix is shared."""
        return all(prefix is None for prefix in self.prefixes)


@dataclass(frozen=True)
class MicroBatch:
    """The tensors of S sequences. T tokens in all, N of them targets, of a step of E examples.

    Where last tokens are read instead of targets, N is S: one for each sequence, in their order.

    Attributes:
        input_ids: `[1, T]`.
        position_ids: `[1, T]`, from 0 within each sequence.
        segments: which tokens belong together.
        read_positions: `[P]`, ascending: the positions whose output is read, and the few between neighbours.
        read_index: `[N]`, where in `read_positions` the one that predicts each target is, or each last token.
        target_ids: `[N]`, or the last tokens.
        sequence_of: `[N]`, the sequence of each target, from 0 to S - 1, in the order in which they were given.
        example_of: `[S]`, the example of each sequence; others of its sequences may be elsewhere.
        weights: `[S]` fp32, how much the example of each sequence counts in the loss.
        values: `[S]` or `[S, K]` each: what is stored beside the tokens of each sequence's example.
        num_examples: E.
        num_tokens: tokens of the sequences; T is less by what shared prefixes save.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: SegmentLayout
    read_positions: torch.Tensor
    read_index: torch.Tensor
    target_ids: torch.Tensor
    sequence_of: torch.Tensor
    example_of: torch.Tensor
    weights: torch.Tensor
    values: Mapping[str, torch.Tensor]
    num_examples: int
    num_tokens: int

    @property
    def predicting(self) -> torch.Tensor:
        """`[N]`, the position whose output is read: the one before each target, or that of each last token."""
        return self.read_positions[self.read_index]

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`; does not wait for the copy if the tensors are pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        """The same in page-locked memory, from which a GPU copies by itself."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        changes: dict[str, Any] = {
            own.name: change(value)
            for own in fields(self)
            if isinstance(value := getattr(self, own.name), torch.Tensor)
        }
        return replace(self, **changes, values={name: change(value) for name, value in self.values.items()})


def pack(
    sequences: Sequence[TokenSequence], example_of: Sequence[int], num_examples: int, share_prefixes: bool = False,
    values: Sequence[Mapping[str, float | npt.NDArray[np.float32]]] = (), weights: Sequence[float] | None = None,
    reads: Reads = "targets",
) -> MicroBatch:  # fmt: skip
    """Put S sequences end to end, of which some may belong to the same example and others of it be elsewhere.

    Args:
        sequences: tokens and loss mask of each.
        example_of: for each the number of its example.
        num_examples: of the step, or whatever they are numbered in.
        share_prefixes: whether a beginning that several have in common is there once.
        values: for each what is stored beside the tokens of its example; none by default.
        weights: of the example of each; 1 by default.
        reads: where outputs are read.
    """
    ids = [np.asarray(sequence.input_ids, dtype=np.int64) for sequence in sequences]
    masks = [np.asarray(sequence.loss_mask, dtype=bool) for sequence in sequences]
    shared = []
    if share_prefixes:
        prefixes_of = [shareable_prefix(*pair) for pair in zip(ids, masks, strict=True)]
        shared = find_prefixes(prefixes_of, [len(own) for own in ids])
    grouped = {index for group in shared for index in group.members}
    alone = [SharedPrefix(0, (index,)) for index in range(len(ids)) if index not in grouped]

    segments, position_ids, prefixes = list[Ints](), list[Ints](), list[int | None]()
    predicting, targets, sequence_of = list[Ints](), list[Ints](), list[Ints]()
    num_packed = 0
    for group in [*shared, *alone]:
        length, prefix = group.length, None
        if length:
            prefix = len(segments)
            segments.append(ids[group.members[0]][:length])
            position_ids.append(np.arange(length))
            prefixes.append(None)
            num_packed += length
        end = num_packed  # of the prefix: its last token predicts the first one behind it
        for index in group.members:
            if reads == "last_token":
                places = np.array([len(ids[index]) - 1])
                predicting.append(num_packed + places - length)
            else:
                assert not masks[index][0], "nothing predicts the first token of a sequence"
                places = np.flatnonzero(masks[index])
                predicting.append(np.where(places > length, num_packed + places - length - 1, end - 1))
            targets.append(ids[index][places])
            sequence_of.append(np.full(len(places), index))
            segments.append(ids[index][length:])
            position_ids.append(np.arange(length, len(ids[index])))
            prefixes.append(prefix)
            num_packed += len(ids[index]) - length

    lengths = tuple(map(len, segments))
    predicted_from, target_ids, of_sequence = map(np.concatenate, (predicting, targets, sequence_of))
    if reads == "last_token":  # groups of sequences that share a prefix came first
        order = np.argsort(of_sequence)
        predicted_from, target_ids, of_sequence = predicted_from[order], target_ids[order], of_sequence[order]
    read = _joined(np.unique(predicted_from), np.cumsum([0, *lengths]))
    return MicroBatch(
        input_ids=torch.from_numpy(np.concatenate(segments))[None],
        position_ids=torch.from_numpy(np.concatenate(position_ids))[None],
        segments=SegmentLayout(lengths, tuple(prefixes), tuple(read.tolist())),
        read_positions=torch.from_numpy(read),
        read_index=torch.from_numpy(np.searchsorted(read, predicted_from)),
        target_ids=torch.from_numpy(target_ids),
        sequence_of=torch.from_numpy(of_sequence),
        example_of=torch.from_numpy(np.asarray(example_of, dtype=np.int64)),
        weights=torch.from_numpy(np.asarray([1.0] * len(ids) if weights is None else weights, dtype=np.float32)),
        values={
            name: torch.from_numpy(np.array([of_one[name] for of_one in values], dtype=np.float32))
            for name in (values[0] if values else ())
        },
        num_examples=num_examples,
        num_tokens=sum(map(len, ids)),
    )


def _joined(positions: Ints, edges: Ints) -> Ints:
    """`positions` `[P]` and those in short gaps between them, since each unbroken row of them attends by itself.

    A row's keys are all before it, so many short rows of one long sequence have many times its keys: then longer gaps
    are filled too. No gap across one of the `edges`, where segments begin and end, is filled.
    """
    segments = np.searchsorted(edges, positions, side="right")
    gaps = np.where(np.diff(segments) == 0, np.diff(positions) - 1, edges[-1])
    for longest in (*_JOINED_GAPS, edges[-1] - 1):
        last = np.append(gaps > longest, True)  # of an unbroken row
        if (positions - edges[segments - 1] + 1)[last].sum() <= _MOST_KEYS * edges[-1]:
            break
    short = np.flatnonzero((gaps > 0) & ~last[:-1])
    between = [np.arange(positions[place] + 1, positions[place + 1]) for place in short]
    return np.sort(np.concatenate([positions, *between]))


def pack_bins(lengths: Sequence[int], budget_tokens: int, prefixes: Sequence[SharedPrefix] = ()) -> list[list[int]]:
    """Sort items into as few bins of at most `budget_tokens` as best-fit decreasing finds.

    An item longer than the budget gets a bin of its own. Items that share a prefix go together, the prefix counted once
    in each bin, and for each item what attention keeps of it.

    Args:
        lengths: tokens of each item, its prefix included.
        budget_tokens: the most tokens in a bin.
        prefixes: which items begin with the same tokens.

    Returns:
        Bins of indices into `lengths`, largest item first; deterministic.
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
