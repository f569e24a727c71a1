"""The benchmarks run, and their gate tells an exact arm from one that is not."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.compare import flop_per_token, gate
from benchmarks.profile_step import profile
from benchmarks.scaling import answered, balance, planned
from benchmarks.workload import Workload

ROOT = Path(__file__).parents[1]


def measured(loss: float, *gradients: float) -> SimpleNamespace:
    """What an arm's first step gave."""
    return SimpleNamespace(name="arm", loss=loss, gradients={"b": np.ones(2), "a": np.array(gradients)}, error=None)


@pytest.mark.parametrize(
    ("arm", "exact"),
    [
        (measured(2.0, 1.0, -4.0), True), (measured(2.000009, 1.0, -4.0), True), (measured(2.00002, 1.0, -4.0), False),
        (measured(2.0, 1.0003, -4.0), True), (measured(2.0, 1.0, -4.001), False),
        (measured(float("nan"), 1.0, -4.0), False), (measured(2.0, 1.0, float("nan")), False),
    ],
)  # fmt: skip
def test_the_gate_lets_only_the_plain_loops_result_pass(arm: SimpleNamespace, exact: bool) -> None:
    assert gate(arm, measured(2.0, 1.0, -4.0))["exact"] is exact


def test_an_arm_over_another_base_is_not_judged() -> None:
    arm = measured(3.0, 7.0)
    arm.name = "lmtune-over-nf4"
    assert gate(arm, measured(2.0, 1.0))["exact"] is None


def test_rows_are_the_same_for_every_arm_and_others_at_each_step() -> None:
    one, other = (Workload("1m", batch_size=4).rows(3) for _ in range(2))
    assert all(
        np.array_equal(a.sequences[0].input_ids, b.sequences[0].input_ids) for a, b in zip(one, other, strict=True)
    )
    assert not np.array_equal(
        one[0].sequences[0].input_ids, Workload("1m", batch_size=4).rows(4)[0].sequences[0].input_ids
    )


def test_rows_of_a_file_are_rendered_by_a_tokenizer_trained_on_it() -> None:
    work = Workload("1m", batch_size=8, data=str(ROOT / "examples" / "support.jsonl"))
    assert all(row.sequences[0].loss_mask.any() for row in work.rows(1))
    assert all(row.sequences[0].input_ids.dtype == np.int64 for row in work.rows(1))  # as the plain arms need them
    assert 0 < work.trained_share < 1
    assert flop_per_token(work, [1]) > 0


@pytest.mark.long
def test_a_comparison_from_its_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.compare", "--shape", "1m", "--batch-size", "4", "--repeats", "1"]
    command += ["--arms", "lmtune", "lmtune-without-last-layer", "plain-padded", "--output", str(tmp_path / "o.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "o.json").read_text())
    arms = {arm["arm"]: arm for arm in report["arms"]}
    assert all(arm["exact"] for arm in arms.values()), done.stdout
    assert arms["plain-packed"]["repeats"] == 0  # it was there for the gate
    assert arms["lmtune"]["computed_per_real_token"] == 1.0 < arms["plain-padded"]["computed_per_real_token"]
    assert arms["lmtune"]["tokens_per_second_median"] > 0
    assert "lmtune-without-last-layer" in done.stdout


@pytest.mark.long
@pytest.mark.parametrize(
    ("module", "options", "key"),
    [
        ("gpu", ["--device", "cpu", "--cases", "1m:none", "1m:nf4", "--rows", "4", "--repeats", "1", "--arms", "lmtune",
                 "lmtune-unfused", "plain-packed", "trl-varlen"], "results"),
        ("curves", ["--data", "examples/support.jsonl", "--steps", "4", "--seeds", "0", "--learning-rate", "1e-3"],
         "curves"),
    ],
)  # fmt: skip
def test_a_benchmark_from_its_command_line(tmp_path: Path, module: str, options: list[str], key: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{module}", *options, "--output", str(tmp_path / "o.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "o.json").read_text())[key]
    assert len(results) == (8 if module == "gpu" else 3), done.stdout
    assert not [result for result in results if "error" in result], done.stdout


@pytest.mark.slow
def test_planning_and_balance_are_measured() -> None:
    found = planned(1000)
    assert found["steps"] == 32
    assert found["memory_gib"] < 1
    found = balance(2)
    assert 1 <= found["dealt"] < found["in_order"]


def test_requests_at_a_time_are_measured() -> None:
    found = answered((1, 3), tokens=4)
    assert [one["requests"] for one in found] == [1, 3]
    assert found[0]["tokens_per_second"] * found[0]["seconds"] == pytest.approx(4, rel=0.2)


@pytest.mark.long
def test_a_step_is_profiled_by_parts() -> None:
    report = profile(Workload("1m", batch_size=2), "cpu")
    assert sum(report["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert all(report["shares"].values())
    assert report["tokens_per_second"] > 0
