"""Sources with shares: the shares hold in every epoch, no row stands twice in one, and all rows have their turn."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from lmtune.batching.plan import Planner
from lmtune.config.schema import DataSource, TrainConfig
from lmtune.data.mixing import Mixture, mix
from lmtune.data.sequences import SequenceTable
from lmtune.errors import DataError


def mixed(sizes: list[int], shares: list[float | None]) -> Mixture | None:
    sources = [DataSource(path=f"s{n}", share=share) for n, share in enumerate(shares)]
    return mix(sources, np.repeat(np.arange(len(sizes)), sizes))


@pytest.mark.parametrize(
    ("sizes", "shares", "taken"),
    [
        ([700, 300], [0.7, 0.3], (700, 300)),
        ([700, 1000], [0.7, 0.3], (700, 300)),
        ([700, 30], [0.7, 0.3], (70, 30)),
        ([100, 300, 700], [0.5, None, None], (100, 30, 70)),  # the rest in proportion to the sizes
        ([100, 1000], [0.1, None], (100, 900)),
        ([3, 5], [1 / 3, 2 / 3], (3, 5)),  # at most what there is
    ],
)
def test_an_epoch_is_the_largest_in_which_no_row_stands_twice(
    sizes: list[int], shares: list[float | None], taken: tuple[int, ...]
) -> None:
    mixture = mixed(sizes, shares)
    assert mixture is not None
    if sizes == [3, 5]:
        assert mixture.num_rows in (7, 8)
        return
    assert mixture.taken == taken
    assert any(count == size for count, size in zip(taken, sizes, strict=True))


def test_every_epoch_has_the_shares_and_every_row_its_turn() -> None:
    mixture = mixed([20, 47, 10], [0.5, 0.25, 0.25])
    assert mixture is not None
    seen: Counter[int] = Counter()
    for epoch in range(8):
        rows = mixture.rows(seed=3, epoch=epoch)
        assert len(set(rows.tolist())) == len(rows) == mixture.num_rows == 40
        assert np.bincount(mixture.source[rows]).tolist() == [20, 10, 10]
        assert np.array_equal(rows, mixture.rows(seed=3, epoch=epoch))
        seen.update(rows[mixture.source[rows] == 1].tolist())
    assert len(seen) > 40  # of 47: 4 epochs bring 40 rows, and later ones those that were left
    assert max(seen.values()) == 2  # a row is not taken again before its order is through


def test_without_shares_all_rows_are_an_epoch() -> None:
    assert mixed([3, 4], [None, None]) is None


@pytest.mark.parametrize(
    ("sizes", "shares", "words"),
    [([5, 0], [0.5, 0.5], "s1: no row is left"), ([2, 5000], [0.9999, 0.0001], "s1: a share of 0.0001 is not one")],
)
def test_a_share_that_cannot_be_had_is_refused(sizes: list[int], shares: list[float | None], words: str) -> None:
    with pytest.raises(DataError) as error:
        mixed(sizes, shares)
    assert words in str(error.value)


def test_the_plan_takes_the_rows_of_the_mixture_in_steps() -> None:
    tokens = np.arange(1, 78, dtype=np.int32) + 4
    mixture = mixed([20, 47, 10], [0.5, 0.25, 0.25])
    table = SequenceTable(tokens, tokens - 1, np.arange(78), mixture=mixture)
    plan = Planner(table, TrainConfig(batch_size=16, epochs=2), 2, 64)
    assert (plan.steps_per_epoch, plan.total_steps) == (3, 6)
    assert [len(plan.step(step).rows) for step in range(1, 7)] == [16, 16, 8] * 2
    assert plan.step(3).epoch == 1.0
    for epoch in range(2):
        rows = [row for step in range(3 * epoch + 1, 3 * epoch + 4) for row in plan.step(step).rows]
        assert mixture is not None
        assert sorted(rows) == sorted(mixture.rows(0, epoch).tolist())
    means = [tokens[:20].mean(), tokens[20:67].mean(), tokens[67:].mean()]
    assert table.tokens_per_epoch == pytest.approx(20 * means[0] + 10 * means[1] + 10 * means[2])
