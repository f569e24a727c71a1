"""The background thread gives what the plan says, in its order, and hands its errors over."""

import threading

import pytest
import torch

from lmtune.batching.packing import pack_sequences
from lmtune.batching.plan import Plan
from lmtune.batching.prefetch import BatchPrefetcher
from tests.tiny import Rows, random_rows
from tests.training.test_plan import settings


def plan_for(rows: Rows, budget: int = 60, world_size: int = 1) -> Plan:
    """Two epochs of `rows` in batches of four."""
    return Plan(rows.sequences, settings(epochs=2), world_size, budget)


def feeders() -> int:
    return sum(thread.name == "lmtune-prefetcher" for thread in threading.enumerate())


@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_and_batches_are_those_of_the_plan(world_size: int) -> None:
    rows = random_rows(10)
    plan = plan_for(rows, world_size=world_size)
    with BatchPrefetcher(plan, world_size - 1, rows.__getitem__) as prefetcher:
        prefetcher.start(step=2)
        for step in range(2, plan.total_steps + 1):
            todo = prefetcher.next_step()
            assert todo == plan.step(step)
            wanted = [
                pack_sequences([rows[unit.row].sequences[unit.document] for unit in group],
                               [unit.example for unit in group], len(todo.rows))
                for group in todo.shares[world_size - 1]
            ]  # fmt: skip
            given = list(prefetcher.batches())
            assert len(given) == len(wanted)
            for one, other in zip(given, wanted, strict=True):
                assert torch.equal(one.input_ids, other.input_ids)
                assert torch.equal(one.examples, other.examples)
                assert one.layout == other.layout
    assert feeders() == 0


def test_it_stays_a_few_batches_ahead_and_stops_when_closed() -> None:
    rows, read = random_rows(10), []

    def reading(row: int) -> object:
        read.append(row)
        return rows[row]

    with BatchPrefetcher(plan_for(rows, budget=1), 0, reading) as prefetcher:
        prefetcher.start(step=1)
        prefetcher.next_step()
        next(prefetcher.batches())
        assert feeders() == 1
    assert len(read) <= 6
    assert feeders() == 0


def test_a_new_plan_takes_over_at_any_batch() -> None:
    rows = random_rows(10)
    with BatchPrefetcher(plan_for(rows, budget=1), 0, rows.__getitem__) as prefetcher:
        prefetcher.start(step=1)
        prefetcher.next_step()
        next(prefetcher.batches())
        prefetcher.start(1, plan_for(rows, budget=10**6))
        assert len(prefetcher.next_step().shares[0]) == 1
        assert len(list(prefetcher.batches())) == 1
        assert prefetcher.next_step().step == 2


def test_what_goes_wrong_in_the_background_is_raised_where_it_is_waited_for() -> None:
    rows = random_rows(10)

    def broken(row: int) -> object:
        raise OSError("the disk is gone")

    with BatchPrefetcher(plan_for(rows), 0, broken) as prefetcher:
        prefetcher.start(step=1)
        prefetcher.next_step()
        with pytest.raises(OSError, match="the disk is gone"):
            list(prefetcher.batches())
        with pytest.raises(OSError, match="the disk is gone"):  # whoever asks again does not wait for ever
            prefetcher.next_step()
    assert feeders() == 0
