"""The learning rate against its formulas."""

import math

import pytest

from lmtune.config.load import build_config
from lmtune.config.schema import TrainConfig
from lmtune.training.optim import learning_rate


def rates(steps: int, schedule: str, warmup_ratio: float) -> list[float]:
    """The rates of all steps, at most 1."""
    tree = {"learning_rate": 1.0, "schedule": schedule, "warmup_ratio": warmup_ratio}
    train = build_config(TrainConfig, tree, "test")
    return [learning_rate(step, steps, train) for step in range(1, steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_rises_evenly_to_the_full_rate(schedule: str) -> None:
    assert rates(40, schedule, 0.1)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates(40, schedule, 0.1)[4] == pytest.approx(1.0)  # the first step after it is at the top still
    assert rates(10, schedule, 0.0)[0] == 1.0
    assert rates(4, schedule, 1.0) == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_the_shapes() -> None:
    constant, linear, cosine = (rates(30, name, 0.1)[3:] for name in ("constant", "linear", "cosine"))
    assert constant == [1.0] * 27
    assert linear == pytest.approx([1 - k / 27 for k in range(27)])
    assert cosine == pytest.approx([(1 + math.cos(math.pi * k / 27)) / 2 for k in range(27)])


@pytest.mark.parametrize(("ratio", "steps", "warmup"), [(0.03, 100, 3), (0.07, 100, 7), (0.29, 100, 29), (0.05, 30, 2)])
def test_the_warm_up_is_the_ratio_of_the_steps_rounded_up(ratio: float, steps: int, warmup: int) -> None:
    found = rates(steps, "linear", ratio)
    assert found.index(max(found)) + 1 == warmup
