"""The background thread gives what the plan says, in its order, and hands its errors over."""

import threading

import pytest
import torch

from lmtune.batching.plan import Planner
from lmtune.batching.prefetch import BatchPrefetcher, pack_units
from lmtune.data.types import TokenizedExample
from tests.tiny import Rows, random_rows
from tests.training.test_plan import settings


def plan_for(rows: Rows, budget: int = 60, world_size: int = 1) -> Planner:
    """Two epochs of `rows` in batches of four."""
    return Planner(rows.sequences, settings(epochs=2), world_size, budget)


def feeders() -> int:
    return sum(thread.name == "lmtune-prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_and_batches_are_those_of_the_plan(world_size: int) -> None:
    rows = random_rows(10)
    plan = plan_for(rows, world_size=world_size)
    with BatchPrefetcher(plan, world_size - 1, rows) as prefetcher:
        prefetcher.start(step=2)
        for step in range(2, plan.total_steps + 1):
            todo = prefetcher.next_step()
            assert todo == plan.step(step)
            wanted = [pack_units(rows, units, len(todo.rows)) for units in todo.micro_batches[world_size - 1]]
            given = list(prefetcher.batches())
            assert len(given) == len(wanted)
            for one, other in zip(given, wanted, strict=True):
                assert torch.equal(one.input_ids, other.input_ids)
                assert torch.equal(one.example_of, other.example_of)
                assert one.segments == other.segments
    assert feeders() == 0


class Reading(Rows):
    """Rows that note which of them are read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.read: list[int] = []

    def __getitem__(self, index: int) -> TokenizedExample:
        self.read.append(index)
        return super().__getitem__(index)


class Broken(Rows):
    """Rows on a disk that is gone."""

    def __getitem__(self, index: int) -> TokenizedExample:
        raise OSError("the disk is gone")


def test_it_stays_a_few_batches_ahead_and_stops_when_closed() -> None:
    rows = Reading(random_rows(10).rows)
    with BatchPrefetcher(plan_for(rows, budget=1), 0, rows) as prefetcher:
        prefetcher.start(step=1)
        prefetcher.next_step()
        next(prefetcher.batches())
        assert feeders() == 1
    assert len(rows.read) <= 6
    assert feeders() == 0


def test_a_new_plan_takes_over_at_any_batch() -> None:
    rows = random_rows(10)
    with BatchPrefetcher(plan_for(rows, budget=1), 0, rows) as prefetcher:
        prefetcher.start(step=1)
        prefetcher.next_step()
        next(prefetcher.batches())
        prefetcher.start(1, plan_for(rows, budget=10**6))
        assert len(prefetcher.next_step().micro_batches[0]) == 1
        assert len(list(prefetcher.batches())) == 1
        assert prefetcher.next_step().step == 2


def test_what_goes_wrong_in_the_background_is_raised_where_it_is_waited_for() -> None:
    rows = Broken(random_rows(10).rows)
    with BatchPrefetcher(plan_for(rows), 0, rows) as prefetcher:
        prefetcher.start(step=1)
        prefetcher.next_step()
        with pytest.raises(OSError, match="the disk is gone"):
            list(prefetcher.batches())
        with pytest.raises(OSError, match="the disk is gone"):  # whoever asks again does not wait for ever
            prefetcher.next_step()
    assert feeders() == 0
