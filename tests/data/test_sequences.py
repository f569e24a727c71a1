"""Rows as sequences: which belong to which row, and those of chosen rows."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lmtune.data.sequences import SequenceTable

ROWS = st.lists(st.lists(st.integers(2, 90), min_size=1, max_size=4), min_size=1, max_size=12)


def of(rows: list[list[int]]) -> SequenceTable:
    """SequenceTable of these lengths, one token of each trained."""
    tokens = np.array([length for row in rows for length in row], dtype=np.int32)
    return SequenceTable(tokens, np.ones_like(tokens), np.cumsum([0, *(len(row) for row in rows)]))


@given(ROWS, st.data())
def test_chosen_rows_have_their_sequences_in_their_order(rows: list[list[int]], data: st.DataObject) -> None:
    sequences = of(rows)
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8))
    assert sequences.num_tokens[sequences.of_rows(chosen)].tolist() == [n for row in chosen for n in rows[row]]
    some = sequences.select(np.array(chosen, dtype=np.int64))
    assert some.num_rows == len(chosen)
    assert some.num_tokens.tolist() == [n for row in chosen for n in rows[row]]
    assert [some.num_tokens[a:b].tolist() for a, b in zip(some.first, some.first[1:], strict=False)] == [
        rows[row] for row in chosen
    ]


def test_each_knows_its_row_and_place() -> None:
    sequences = of([[5], [7, 9, 2], [4, 4]])
    assert sequences.row.tolist() == [0, 1, 1, 1, 2, 2]
    assert sequences.place_in_row.tolist() == [0, 0, 1, 2, 0, 1]
    assert (sequences.num_rows, sequences.longest) == (3, 9)


def test_rows_of_one_sequence() -> None:
    one = SequenceTable.one_each(np.array([3, 4], dtype=np.int32), np.array([1, 2], dtype=np.int32))
    assert one.of_rows([1, 0]).tolist() == [1, 0]
    assert one.num_rows == 2
