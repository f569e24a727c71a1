"""Common beginnings are found from the tokens alone, and only where they save work."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lmtune.batching import prefixes
from lmtune.batching.prefixes import SharedPrefix, shareable_prefix

SYSTEM, OTHER = np.arange(100, 130), np.arange(200, 260)


def find_prefixes(rows: list[np.ndarray], own: int = 4) -> list[SharedPrefix]:
    """Of rows with `own` tokens after what they may share."""
    return prefixes.find_prefixes(rows, [len(row) + own for row in rows])


def behind(prefix: np.ndarray, *own: int) -> np.ndarray:
    """`prefix` and some tokens."""
    return np.concatenate([prefix, own]).astype(np.int64)


def test_a_common_beginning_of_less_than_sixteen_tokens_is_left_alone() -> None:
    assert find_prefixes([behind(SYSTEM[:15], 1), behind(SYSTEM[:15], 2)]) == []
    assert find_prefixes([behind(SYSTEM[:16], 1), behind(SYSTEM[:16], 2)]) == [SharedPrefix(16, (0, 1))]


def test_a_row_that_shares_less_does_not_cost_the_others_their_prefix() -> None:
    rows = [behind(OTHER, 1), behind(OTHER, 2), behind(OTHER[:20], 3)]
    (group,) = find_prefixes(rows)
    assert group == SharedPrefix(60, (0, 1))


def test_a_prefix_that_is_short_beside_its_rows_is_left_alone() -> None:
    """Behind a prefix a row attends through a mask, which costs a long row more than a few tokens saved."""
    rows = [behind(SYSTEM, n) for n in range(4)]
    assert find_prefixes(rows, own=200) == [SharedPrefix(30, (0, 1, 2, 3))]
    assert find_prefixes(rows, own=1000) == []


def test_a_beginning_ends_before_the_first_trained_token_and_leaves_one_token() -> None:
    ids = np.arange(6)
    assert shareable_prefix(ids, np.array([0, 0, 0, 1, 1, 1], dtype=bool)).tolist() == [0, 1, 2]
    assert shareable_prefix(ids, np.array([1, 0, 0, 1, 1, 1], dtype=bool)).tolist() == []
    assert shareable_prefix(ids, np.array([0, 0, 0, 0, 0, 1], dtype=bool)).tolist() == [0, 1, 2, 3, 4]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(0, 3)), max_size=12))
def test_members_have_the_prefix_and_belong_to_one_group(rows: list[tuple[int, int, int]]) -> None:
    beginnings = [np.array([kind] * length + [9 + own], dtype=np.int64) for kind, length, own in rows]
    seen: set[int] = set()
    for group in find_prefixes(beginnings):
        assert group.length >= 16
        assert len(group.members) > 1
        first = beginnings[group.members[0]][: group.length]
        assert len(first) == group.length
        assert all(np.array_equal(beginnings[index][: group.length], first) for index in group.members)
        assert not seen & set(group.members)
        seen |= set(group.members)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(14, 22)), min_size=1, max_size=7))
def test_the_groups_save_as_much_as_any_others(rows: list[tuple[int, int]]) -> None:
    beginnings = [np.array([kind] * length, dtype=np.int64) for kind, length in rows]

    def saved(part: list[int]) -> int:
        length = min(rows[index][1] for index in part)
        same = len({rows[index][0] for index in part}) == 1
        return (len(part) - 1) * length if same and length >= 16 else 0

    def best(indices: list[int]) -> int:
        if not indices:
            return 0
        first, rest = indices[0], indices[1:]
        choices = (
            [first, *(index for bit, index in enumerate(rest) if chosen >> bit & 1)] for chosen in range(2 ** len(rest))
        )
        return max(saved(part) + best([index for index in rest if index not in part]) for part in choices)

    found = prefixes.find_prefixes(beginnings, [0] * len(beginnings))
    assert sum((len(group.members) - 1) * group.length for group in found) == best(list(range(len(rows))))
