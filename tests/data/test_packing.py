"""Packing cuts, drops and repeats nothing, holds its budget, and keeps each label at its place."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmtune.batching.packing import pack_bins
from lmtune.batching.prefixes import SharedPrefix
from lmtune.data.types import TokenizedExample
from tests.tiny import pack_rows, random_rows, token_sequence

lengths_and_budget = st.tuples(st.lists(st.integers(1, 200), max_size=60), st.integers(1, 400))


@given(lengths_and_budget)
def test_groups_are_few_hold_the_budget_and_begin_with_the_longest(case: tuple[list[int], int]) -> None:
    lengths, budget = case
    groups = pack_bins(lengths, budget)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    loads = sorted((sum(lengths[index] for index in group), len(group)) for group in groups)
    assert all(load <= budget or count == 1 for load, count in loads)
    assert len(loads) < 2 or loads[0][0] + loads[1][0] > budget, "no two groups would fit into one"
    assert all(lengths[group[0]] == max(lengths[index] for index in group) for group in groups)


def test_known_cases() -> None:
    assert pack_bins([], 10) == []
    assert pack_bins([5, 5, 5], 10) == [[0, 1], [2]]
    assert pack_bins([3, 9, 7, 1], 10) == [[1, 3], [2, 0]]
    assert pack_bins([30, 2], 10) == [[0], [1]]


def test_a_shared_prefix_counts_once_in_each_group() -> None:
    prefix = SharedPrefix(8, (0, 2, 3))
    """And an eighth of it more with each row, for the keys and values that attention keeps."""
    assert pack_bins([10, 4, 10, 10], 17, [prefix]) == [[0, 2, 3], [1]]
    assert pack_bins([10, 4, 10, 10], 14, [prefix]) == [[0, 2], [3], [1]]
    assert pack_bins([10, 3, 10, 10], 14, [prefix]) == [[0, 2], [3, 1]]
    assert sorted(pack_bins([10, 4, 10, 10], 5, [prefix])) == [[0], [1], [2], [3]]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 20), st.integers(1, 100))
def test_groups_with_a_prefix_partition_the_items_within_the_budget(own: list[int], shared: int, budget: int) -> None:
    prefix = SharedPrefix(shared, tuple(range(0, len(own), 2)))
    lengths = [n + shared if index % 2 == 0 else n for index, n in enumerate(own)]
    prefixes = [prefix] if len(prefix.members) > 1 else []
    groups = pack_bins(lengths, budget, prefixes)
    assert sorted(index for group in groups for index in group) == list(range(len(own)))
    for group in groups:
        behind = sum(index % 2 == 0 for index in group)
        with_prefix = shared + behind * (shared // 8) if prefixes and behind else shared * behind
        size = sum(own[index] for index in group) + with_prefix
        assert len(group) == 1 or size <= budget


def test_the_tensors_of_a_pack() -> None:
    rows = [
        TokenizedExample("a:1", [token_sequence([11, 12, 13], [0, 0, 1])]),
        TokenizedExample("a:2", [token_sequence([21, 22], [0, 1]), token_sequence([31, 32, 33, 34], [0, 1, 0, 1])]),
    ]
    batch = pack_rows(rows)
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22, 31, 32, 33, 34]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert batch.segments.lengths == (3, 2, 4)
    assert batch.target_ids.tolist() == [13, 22, 32, 34]
    assert batch.predicting.tolist() == [1, 3, 5, 7]
    assert batch.sequence_of.tolist() == [0, 1, 2, 2]
    assert batch.example_of.tolist() == [0, 1, 1]
    assert (batch.num_examples, batch.num_tokens) == (2, 9)
    assert batch.input_ids.dtype == batch.position_ids.dtype == batch.target_ids.dtype == torch.int64


@pytest.mark.parametrize("count", [1, 2, 11])
def test_a_pack_has_no_padding_and_every_label(count: int) -> None:
    rows = random_rows(count)
    batch = pack_rows(rows.rows)
    assert batch.num_tokens == rows.sequences.num_tokens.sum() == sum(batch.segments.lengths)
    assert len(batch.target_ids) == rows.num_targets
    assert torch.equal(batch.input_ids[0, batch.predicting + 1], batch.target_ids)
    # a predictor is never the last token of another document
    starts = np.cumsum([0, *batch.segments.lengths[:-1]])
    assert not set((batch.predicting + 1).tolist()) & set(starts.tolist())
