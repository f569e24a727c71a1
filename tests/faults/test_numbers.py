"""Losses and gradients that are no numbers stop the run before they reach a weight; out of memory stops nothing."""

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lmtune.forward.packed import PackedForward
from lmtune.models.tuning.base import trainable
from lmtune.training.checkpoint import newest_checkpoint
from tests.jobs import final_weights, job_for, records
from tests.processes import at_step, lmtune, said, together, wrap
from tests.workplace import QUESTIONS, lasting, write_rows


def finite(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether all are numbers."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


MARK, MARKED = "@", 16  # a character of one row only, which comes in the third step or later


def no_loss_for_the_marked() -> None:
    """The loss of a micro-batch that holds the marked row is NaN."""
    from transformers import AutoTokenizer

    mark = AutoTokenizer.from_pretrained("base").convert_tokens_to_ids(MARK)

    def forward(real: Any, self: PackedForward, batch: Any, *rest: Any) -> Any:
        scores = real(self, batch, *rest)
        holds = bool((batch.input_ids == mark).any())
        return dataclasses.replace(scores, logprobs=scores.logprobs * float("nan")) if holds else scores

    wrap("lmtune.forward.packed", "PackedForward.__call__", forward)


def test_20_the_command_names_the_row_and_resumes_when_the_cause_is_gone(place: Path) -> None:
    rows = [dict(row) for row in QUESTIONS]
    rows[MARKED]["prompt"] += MARK
    write_rows(place / "train.jsonl", rows)
    assert lmtune(place, "finetune", "run.yaml", trouble=no_loss_for_the_marked) == 1
    told = said(place)
    found = re.search(r"\nerror: step (\d+): the loss \(nan\) .* Non-finite examples:\n((?:  \S+\n)+)", told)
    assert found, told
    assert found[2] == f"  train.jsonl:{MARKED + 1}\n"
    assert "Traceback" not in told
    saved, _ = newest_checkpoint(place / "runs/trial/checkpoints")
    assert saved is not None
    assert saved.step == int(found[1]) - 1 >= 2
    assert finite(saved.weights)
    assert finite(saved.optimizer)
    assert not (place / "runs/trial/adapter").exists()
    assert lmtune(place, "finetune", "run.yaml") == 0, said(place)
    assert f"resumes after step {saved.step}" in said(place)
    assert lmtune(place, "finetune", "run.yaml", "run.name=undisturbed") == 0
    mended, undisturbed = lasting(place), lasting(place, "undisturbed")
    for kept in (mended, undisturbed):
        del kept["adapter"]["README.md"]  # the card names the run
    assert mended == undisturbed


def infinite_gradient(step: int) -> None:
    """From `step` on, the gradient of one adapter matrix is infinite, though the loss is not."""
    at_step(step, _spoil)()


def _spoil() -> None:
    hooked: list[Any] = []

    def forward(real: Any, self: PackedForward, *args: Any) -> Any:
        if not hooked:
            parameter = next(iter(trainable(self.model).values()))
            hooked.append(parameter.register_hook(lambda grad: grad + float("inf")))
        return real(self, *args)

    wrap("lmtune.forward.packed", "PackedForward.__call__", forward)


def test_21_an_infinite_gradient_on_one_of_two_processes_stops_both(
    place: Path, undisturbed_pair: dict[str, Any]
) -> None:
    codes = together(place, "finetune", "run.yaml", troubles={1: partial(infinite_gradient, 5)})
    assert codes == [1, 1]
    for output in ("output0", "output1"):
        assert re.search(
            r"step 5: the loss \([\d.]+\) or the gradient \(norm (inf|nan)\) is not finite", said(place, output)
        )
        assert len(re.findall(r"^  train\.jsonl:\d+$", said(place, output), re.MULTILINE)) == 2  # that process's rows
    saved, _ = newest_checkpoint(place / "runs/trial/checkpoints")
    assert saved is not None
    assert saved.step == 4
    assert finite(saved.weights)
    assert finite(saved.optimizer)
    assert together(place, "finetune", "run.yaml") == [0, 0]
    assert lasting(place) == undisturbed_pair


def limited(tokens: int) -> Callable[..., Any]:
    """A forward pass that has memory for so many tokens when gradients are wanted."""

    def forward(real: Any, self: PackedForward, batch: Any, *rest: Any) -> Any:
        if torch.is_grad_enabled() and batch.input_ids.numel() > tokens:
            raise torch.OutOfMemoryError
        return real(self, batch, *rest)

    return forward


def run_out_once(job: Any, batch: int, backward: bool) -> None:
    """Out of memory at the forward or backward pass of micro-batch number `batch`, counted from 1, and not again."""
    count, real = 0, job.forward.__class__.__call__
    last = next(iter(trainable(job.forward.model).values()))  # its gradient comes after most others

    def forward(self: PackedForward, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count == batch and backward:

            def run_out(_: torch.Tensor) -> None:
                hook.remove()
                raise torch.OutOfMemoryError

            hook = last.register_hook(run_out)
        elif count == batch:
            raise torch.OutOfMemoryError
        return real(self, *args)

    job.forward.__class__ = type("RunsOut", (PackedForward,), {"__call__": forward})


@pytest.mark.parametrize(("batch", "backward"), [(1, True), (2, False), (2, True)])
def test_22_out_of_memory_halves_the_micro_batches_and_equals_the_run_that_had_the_smaller_ones(
    tmp_path: Path, batch: int, backward: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"dropout": 0.3, "train__batch_size": 6}
    small = job_for(tmp_path / "small", **settings, train__micro_batch_tokens=50)
    weights = final_weights(small)
    halved = job_for(tmp_path / "halved", **settings, train__micro_batch_tokens=100)
    assert len(halved.loop.planner.step(1).micro_batches[0]) >= 2
    run_out_once(halved, batch, backward)
    found = final_weights(halved)
    assert "out of memory at step 1: micro-batches of 50 tokens" in capfd.readouterr().err
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    assert records(halved) == records(small)


def out_of_memory_above(tokens: int) -> None:
    """Less memory for this process."""
    wrap("lmtune.forward.packed", "PackedForward.__call__", limited(tokens))


def test_23_out_of_memory_on_one_of_two_processes_halves_the_micro_batches_of_both(place: Path) -> None:
    settings = ("finetune", "run.yaml", "evaluation.keep_best=false")
    troubles = {1: at_step(1, partial(out_of_memory_above, 40))}
    assert together(place, *settings, "train.micro_batch_tokens=32", "run.name=small") == [0, 0]
    assert together(place, *settings, "train.micro_batch_tokens=64", troubles=troubles) == [0, 0]
    assert "out of memory at step 1: micro-batches of 32 tokens" in said(place, "output0")
    found, small = lasting(place), lasting(place, "small")
    assert found["metrics"] == small["metrics"]
    name = "adapter_model.safetensors"
    assert found["adapter"][name] == small["adapter"][name]
