"""The plan: every row once an epoch, the same steps whatever the processes, shares that partition a step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtune.batching.plan import Planner, TokenCost, Unit, assign_to_ranks
from lmtune.batching.prefixes import SharedPrefix
from lmtune.config.load import build_config
from lmtune.config.schema import TrainConfig
from lmtune.data.sequences import SequenceTable


def settings(**changes: object) -> TrainConfig:
    """Checked training settings."""
    return build_config(TrainConfig, {"batch_size": 4, "epochs": 3, **changes}, "test")


def plan_of(lengths: list[int], world_size: int = 1, budget: int = 100, **changes: object) -> Planner:
    """A plan of rows of these lengths, a third of each trained."""
    tokens = np.array(lengths, dtype=np.int32)
    trained = np.maximum(1, tokens // 3).astype(np.int32)
    return Planner(SequenceTable.one_each(tokens, trained), settings(**changes), world_size, budget)


LENGTHS = [int(n) for n in np.random.default_rng(0).integers(1, 90, 23)]


def test_every_row_is_seen_once_an_epoch() -> None:
    plan = plan_of(LENGTHS)
    assert (plan.steps_per_epoch, plan.total_steps) == (6, 18)
    assert [len(plan.step(step).rows) for step in range(1, 8)] == [4, 4, 4, 4, 4, 3, 4]
    assert [plan.step(step).epoch for step in (1, 6, 7)] == pytest.approx([4 / 23, 1.0, 27 / 23])
    for epoch in range(3):
        rows = [row for step in range(6 * epoch + 1, 6 * epoch + 7) for row in plan.step(step).rows]
        assert sorted(rows) == list(range(23))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(plan: Planner, epoch: int) -> list[int]:
        return [row for step in range(6 * epoch + 1, 6 * epoch + 7) for row in plan.step(step).rows]

    plan = plan_of(LENGTHS)
    assert order(plan, 0) != order(plan, 1)
    assert order(plan, 1) == order(plan_of(LENGTHS), 1)
    assert order(plan, 0) == order(plan_of(LENGTHS, world_size=3, budget=7), 0)
    assert order(plan, 0) != order(plan_of(LENGTHS, seed=1), 0)
    assert order(plan_of(LENGTHS, seed=1), 0) != order(plan, 1)  # (seed, epoch), not their sum
    assert order(plan, 0) != sorted(order(plan, 0))


@given(st.lists(st.integers(1, 90), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 120))
def test_shares_partition_the_steps_rows_within_the_budget(lengths: list[int], world: int, budget: int) -> None:
    plan = plan_of(lengths, world, budget, batch_size=7)
    for step in range(1, plan.steps_per_epoch + 1):
        todo = plan.step(step)
        assert len(todo.micro_batches) == world
        units = [unit for share in todo.micro_batches for group in share for unit in group]
        assert sorted(units) == [Unit(example, row, (0,)) for example, row in enumerate(todo.rows)]
        for group in (group for share in todo.micro_batches for group in share):
            assert len(group) == 1 or sum(lengths[unit.row] for unit in group) <= budget
        assert todo.longest == max(lengths[row] for row in todo.rows)
        assert todo.totals.tokens == sum(lengths[row] for row in todo.rows)
        assert todo.totals.targets == sum(max(1, lengths[row] // 3) for row in todo.rows)


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=64), st.integers(2, 8))
def test_shares_are_about_equal(lengths: list[int], world: int) -> None:
    """Graham's bound: 4/3 of the best possible, and the best is at most the mean and one row more."""
    loads = [sum(lengths[place] for place in share) for share in assign_to_ranks(lengths, [0] * len(lengths), world)]
    assert max(loads) <= 4 / 3 * (sum(loads) / world + max(lengths))
    assert max(loads) - min(loads) <= max(lengths)


def test_a_long_row_weighs_more_than_its_tokens() -> None:
    assert assign_to_ranks([100, 60, 50], [0] * 3, 2) == [[0], [1, 2]]
    assert assign_to_ranks([100, 90, 40, 30], [0] * 4, 2, cost=TokenCost(before=0.04)) == [[0, 3], [1, 2]]


def test_a_trained_token_weighs_more_than_another() -> None:
    assert assign_to_ranks([100, 100, 100, 100], [0, 100, 0, 100], 2) == [[0, 2], [1, 3]]
    assert assign_to_ranks([100, 100, 100, 100], [0, 100, 0, 100], 2, cost=TokenCost(target=0.5)) == [[1, 0], [3, 2]]


def test_rows_behind_one_prefix_go_to_one_process_while_that_is_cheaper() -> None:
    prefix = SharedPrefix(100, (0, 1, 2, 3))
    assert assign_to_ranks([110, 110, 110, 110, 130], [0] * 5, 2, [prefix]) == [[4], [0, 1, 2, 3]]
    assert [len(share) for share in assign_to_ranks([300] * 4, [0] * 4, 2, [prefix])] == [2, 2]


def test_rows_that_share_a_prefix_are_planned_together() -> None:
    """Ten rows behind one prefix and ten behind another fit two micro-batches of the size of four whole rows."""
    generator = np.random.default_rng(0)
    prefixes = generator.integers(3, 99, (2, 40))
    lengths = np.full(20, 50, dtype=np.int32)
    sequences = SequenceTable.one_each(lengths, lengths // 5)
    plan = Planner(sequences, settings(batch_size=20), 1, 200, lambda row: [prefixes[row % 2]])
    (share,) = plan.step(1).micro_batches
    assert sorted(len(group) for group in share) == [10, 10]
    assert all(len({unit.row % 2 for unit in group}) == 1 for group in share)
    assert len(plan_of([50] * 20, budget=200, batch_size=20).step(1).micro_batches[0]) == 5


@given(st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=5), min_size=1, max_size=20), st.integers(1, 3))
def test_a_rows_sequences_are_assigned_one_by_one(rows: list[list[int]], world: int) -> None:
    """A batch counts rows; no micro-batch need hold more than one sequence, and each is in one."""
    tokens = np.array([length for row in rows for length in row], dtype=np.int32)
    trained = np.maximum(1, tokens // 3).astype(np.int32)
    sequences = SequenceTable(tokens, trained, np.cumsum([0, *(len(row) for row in rows)]))
    plan = Planner(sequences, settings(batch_size=3), world, 1)
    for step in range(1, plan.steps_per_epoch + 1):
        todo = plan.step(step)
        groups = [group for share in todo.micro_batches for group in share]
        assert all(len(group) == 1 for group in groups)
        assert sorted(unit for group in groups for unit in group) == [
            Unit(example, row, (place,)) for example, row in enumerate(todo.rows) for place in range(len(rows[row]))
        ]
        assert todo.totals.tokens == sum(sum(rows[row]) for row in todo.rows)
        assert todo.totals.targets == sum(max(1, length // 3) for row in todo.rows for length in rows[row])
        assert todo.longest == max(max(rows[row]) for row in todo.rows)
    assert sorted(row for step in range(1, plan.steps_per_epoch + 1) for row in plan.step(step).rows) == list(
        range(len(rows))
    )


@pytest.mark.parametrize(
    ("rows", "changes", "steps"),
    [
        (24, {}, 18), (25, {}, 21), (23, {"epochs": 0.5}, 3), (23, {"epochs": 0.01}, 1), (23, {"epochs": 1.5}, 9),
        (2, {"epochs": 3}, 3), (23, {"max_steps": 50, "epochs": 1}, 50),
    ],
)  # fmt: skip
def test_the_number_of_steps(rows: int, changes: dict[str, object], steps: int) -> None:
    assert Planner.count_steps(rows, settings(**changes)) == steps
    assert plan_of([5] * rows, **changes).total_steps == steps
