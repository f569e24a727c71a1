"""The loop: layout changes nothing, resuming repeats the run bit for bit; see tests/faults for what goes wrong."""

import csv
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lmtune
from lmtune.config.schema import ModelConfig
from lmtune.data.types import TokenizedExample
from lmtune.errors import LmtuneError
from lmtune.evaluation.scoring import Scores
from lmtune.forward.packed import Outputs, PackedForward
from lmtune.kernels.lora_linear import fuse
from lmtune.models.base import load_model
from lmtune.models.tuning.base import trainable
from lmtune.runs.store import checkpoint_folders
from lmtune.training.checkpoint import load_checkpoint
from lmtune.training.memory import is_checkpointed_throughout
from tests.jobs import Job, final_weights, job_for, records, train
from tests.tiny import Rows, adapted, random_rows, tiny_model


def test_micro_batches_of_any_size_give_the_same_adapter(tmp_path: Path) -> None:
    whole = final_weights(job_for(tmp_path / "whole"))
    for budget in (1, 50, 120):
        cut = final_weights(job_for(tmp_path / f"cut{budget}", train__micro_batch_tokens=budget))
        for name, weight in whole.items():
            torch.testing.assert_close(cut[name], weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resuming_from_any_step_is_bitwise_the_same(tmp_path: Path, dropout: float) -> None:
    settings = {"run__checkpoint_every_steps": 1, "run__keep_checkpoints": 10}
    whole = final_weights(job_for(tmp_path / "whole", dropout, **settings))
    for path in checkpoint_folders(tmp_path / "whole" / "checkpoints")[:-1]:
        resumed = load_checkpoint(path)
        folder = tmp_path / f"from{resumed.step}"
        again = final_weights(job_for(folder, dropout, resumed=resumed, **settings))
        assert all(torch.equal(again[name], weight) for name, weight in whole.items()), path.name


def test_out_of_memory_with_a_single_row_enables_checkpointing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = final_weights(job_for(tmp_path / "whole", train__micro_batch_tokens=1))
    real = PackedForward.__call__

    def limited(self, batch):
        if not is_checkpointed_throughout(self.base):
            raise torch.OutOfMemoryError
        return real(self, batch)

    monkeypatch.setattr(PackedForward, "__call__", limited)
    saving = final_weights(job_for(tmp_path / "saving", train__micro_batch_tokens=1))
    assert all(torch.equal(saving[name], weight) for name, weight in whole.items())


def test_out_of_memory_first_gives_up_dense_copies_of_quantized_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def quantized_job(folder: Path, keep: bool) -> Job:
        base = ModelConfig(name=str(tmp_path / "base"), quantization="nf4")
        model = adapted(load_model(base, "cpu"))
        fuse(model, keep_dense=keep)
        return job_for(folder, train__max_steps=2, model=model)

    def held(forward: PackedForward) -> bool:
        return any(getattr(getattr(m, "lmtune_weight", None), "keep", False) for m in forward.base.modules())

    tiny_model().save_pretrained(tmp_path / "base")
    whole, real = final_weights(quantized_job(tmp_path / "whole", False)), PackedForward.__call__

    def limited(self, batch):
        if held(self):
            raise torch.OutOfMemoryError
        return real(self, batch)

    job = quantized_job(tmp_path / "kept", True)
    assert held(job.forward)
    monkeypatch.setattr(PackedForward, "__call__", limited)
    freed = final_weights(job)
    assert all(torch.equal(freed[name], weight) for name, weight in whole.items())
    said = " ".join(capsys.readouterr().err.split())
    assert "out of memory at step 1: no dense copies of quantized weights from here on (same result)" in said
    assert said.count("out of memory") == 1


@pytest.mark.slow
def test_out_of_memory_with_a_single_row_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self, batch):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(PackedForward, "__call__", never)
    with pytest.raises(LmtuneError, match=r"single sequence of .* tokens; lower data.max_length"):
        train(job_for(tmp_path / "run"))


def test_the_best_step_is_kept_and_patience_ends_the_run(tmp_path: Path) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7, 1.0])

    def validate() -> Scores:
        return Scores(next(losses), 1.0, 0.5, 0.5, None, 1, 0)

    job = job_for(
        tmp_path / "run", validate=validate, evaluation__every_steps=1, evaluation__patience=2,
        run__keep_checkpoints=1,
    )  # fmt: skip
    outcome = train(job)
    assert outcome.stopped_early
    assert (outcome.state.step, outcome.state.best_step) == (4, 2)
    best = load_checkpoint(job.run.checkpoints / "step-000002")
    assert all(torch.equal(p, best.weights[n]) for n, p in trainable(job.forward.model).items())


def test_every_step_is_recorded_once_even_after_a_resume(tmp_path: Path) -> None:
    job = job_for(tmp_path / "run", run__checkpoint_every_steps=2, run__keep_checkpoints=10)
    train(job)
    resumed = load_checkpoint(job.run.checkpoints / "step-000004")
    train(job_for(tmp_path / "run", resumed=resumed))
    metrics = job.run.metrics.read_text().splitlines()
    results = job.run.results.read_text().splitlines()
    assert [line.split('"step": ')[1].split(",")[0] for line in metrics] == ["1", "2", "3", "4", "5", "6"]
    assert [line.split(",")[0] for line in results] == ["step", "1", "2", "3", "4", "5", "6"]


def rows_of_many_sequences() -> Rows:
    """Three rows of 8 sequences each, as a template that drops earlier thoughts makes them, and five of one."""
    many = random_rows(24, longest=40)
    sequences = [row.sequences[0] for row in many.rows]
    rows = [TokenizedExample(f"rows.jsonl:{n + 1}", sequences[8 * n : 8 * n + 8]) for n in range(3)]
    return Rows([*rows, *random_rows(5, seed=1, longest=20).rows])


def test_a_row_of_many_sequences_needs_the_memory_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the memory is, the update is the same, and a row counts as right when all its sequences are."""
    settings = {"train__batch_size": 4, "train__max_steps": 3}
    whole = job_for(tmp_path / "whole", **settings)
    whole.parts.data.train = rows_of_many_sequences()
    weights = final_weights(whole)
    longest, real, held = whole.data.sequences.longest, PackedForward.__call__, list[int]()

    def limited(self, batch):
        held.append(batch.num_tokens)
        if batch.num_tokens > longest:
            raise torch.OutOfMemoryError
        return real(self, batch)

    monkeypatch.setattr(PackedForward, "__call__", limited)
    for budget in (1, 10**6):
        cut = job_for(tmp_path / f"cut{budget}", **settings, train__micro_batch_tokens=budget)
        cut.parts.data.train = rows_of_many_sequences()
        found = final_weights(cut)
        for name, weight in weights.items():
            torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=0)
        for one, other in zip(records(whole), records(cut), strict=True):
            assert one == pytest.approx(other, abs=1e-4)
    assert max(held[-3:]) <= longest


def test_a_row_is_right_when_all_its_sequences_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be in different micro-batches: here each is in one of its own."""
    job = job_for(tmp_path / "run", train__micro_batch_tokens=1, train__batch_size=4, train__max_steps=1)
    job.parts.data.train = Rows(rows_of_many_sequences().rows[:4])
    spoilt = job.data[1].sequences[3].input_ids[:3].tolist()
    real = PackedForward.__call__

    def all_but_one_right(self, batch):
        outputs = real(self, batch)
        is_spoilt = batch.input_ids[0, :3].tolist() == spoilt
        return Outputs(outputs.logprobs, torch.full_like(outputs.is_top1, not is_spoilt))

    monkeypatch.setattr(PackedForward, "__call__", all_but_one_right)
    train(job)
    with job.run.results.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["training_sequence_accuracy"]) == 3 / 4


@pytest.mark.parametrize(("minutes", "saved"), [(1.0, [2, 4, 6]), (0.5, [1, 2, 3, 4, 5, 6]), (None, [6])])
def test_a_checkpoint_is_due_after_minutes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float | None, saved: list[int]
) -> None:
    """Steps of half a minute."""
    job = job_for(tmp_path / "run", run__checkpoint_every_minutes=minutes, run__keep_checkpoints=99)
    now = [0.0]

    def half_a_minute(*args: Any) -> None:
        now[0] += 30.0

    monkeypatch.setattr("lmtune.training.loop.seed_step", half_a_minute)
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=perf_counter)
    monkeypatch.setattr("lmtune.training.hooks.time", clock)
    train(job)
    assert [int(path.name[5:]) for path in checkpoint_folders(job.run.checkpoints)] == saved


@pytest.mark.gpu
def test_a_gpu_that_runs_out_of_memory_goes_on_with_smaller_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The memory is really short: from the first step on, the process gets 256 MiB more than it has."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    rows = [{"prompt": f"{n}? " + "word " * (n % 90), "completion": "yes " * (n % 17 + 1)} for n in range(192)]
    real = PackedForward.__call__

    def adapter(name: str, budget: int) -> dict[str, torch.Tensor]:
        overrides = [
            f"run.dir={tmp_path}", f"run.name={name}", f"train.micro_batch_tokens={budget}", "train.max_steps=2",
            "train.batch_size=192", "model.dtype=float32", "data.validation_fraction=0", "evaluation.keep_best=false",
        ]  # fmt: skip
        run = lmtune.finetune(model="tiny", data=rows, overrides=overrides)
        return load_file(run.adapter / "adapter_model.safetensors")

    def short(self: PackedForward, batch: Any) -> Outputs:
        if torch.is_grad_enabled() and batch.input_ids.numel() > 8192:
            torch.cuda.empty_cache()
            allowed = torch.cuda.memory_reserved() + 256 * 2**20
            torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.mem_get_info()[1])
        return real(self, batch)

    small = adapter("small", 256)
    assert "out of memory" not in capfd.readouterr().err
    monkeypatch.setattr(PackedForward, "__call__", short)
    try:
        found = adapter("short", 16384)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory at step 1: micro-batches of" in capfd.readouterr().err
    for name, weight in small.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=0)
