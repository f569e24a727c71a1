"""The loop: layout changes nothing, resuming repeats the run bit for bit, a bad step changes no weight."""

from pathlib import Path

import pytest
import torch

from lmtune.config import FinetuneConfig, build_config
from lmtune.errors import LmtuneError
from lmtune.kernels.packed_forward import PackedForward
from lmtune.models.adapters import trainable
from lmtune.runs import RunDirectory
from lmtune.training import loop
from lmtune.training.activations import is_checkpointed_throughout
from lmtune.training.checkpoint import checkpoint_folders, newest_checkpoint
from lmtune.training.loop import Job, train
from lmtune.training.records import Accuracies
from tests.tiny import OneProcess, adapted, random_rows, tiny_model


def job_for(folder: Path, dropout: float = 0.0, resumed=None, validate=None, **settings) -> Job:
    """A job of 12 rows, batches of 4, over a tiny model; settings as `section__key`."""
    tree = {
        "model": {"name": "tiny-random", "quantization": "none"}, "data": {"train": "rows.jsonl"},
        "train": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2}, "evaluation": {}, "run": {"name": "test"},
    }  # fmt: skip
    for key, value in settings.items():
        section, _, name = key.partition("__")
        tree[section][name] = value
    config = build_config(FinetuneConfig, tree, "test")
    folder.mkdir(exist_ok=True)
    forward = PackedForward(adapted(tiny_model(), dropout=dropout))
    budget = 10**6 if config.train.micro_batch_tokens == "auto" else config.train.micro_batch_tokens
    return Job(
        RunDirectory(folder), config, forward, random_rows(12), OneProcess(), budget, {"data": "x"}, validate, resumed
    )


def final_weights(job: Job) -> dict[str, torch.Tensor]:
    train(job)
    return {name: parameter.detach().clone() for name, parameter in trainable(job.forward.model).items()}


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
        resumed = loop.load_checkpoint(path)
        folder = tmp_path / f"from{resumed.step}"
        again = final_weights(job_for(folder, dropout, resumed=resumed, **settings))
        assert all(torch.equal(again[name], weight) for name, weight in whole.items()), path.name


def test_out_of_memory_halves_the_micro_batches_and_equals_the_smaller_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = final_weights(job_for(tmp_path / "small", train__micro_batch_tokens=100))
    real = PackedForward.__call__

    def limited(self, batch, weight=1.0):
        if batch.num_tokens > 100:
            raise torch.OutOfMemoryError
        return real(self, batch, weight)

    monkeypatch.setattr(PackedForward, "__call__", limited)
    halved = final_weights(job_for(tmp_path / "halved", train__micro_batch_tokens=200))
    assert all(torch.equal(halved[name], weight) for name, weight in small.items())


def test_out_of_memory_with_a_single_row_computes_layers_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = final_weights(job_for(tmp_path / "whole", train__micro_batch_tokens=1))
    real = PackedForward.__call__

    def limited(self, batch, weight=1.0):
        if not is_checkpointed_throughout(self.base):
            raise torch.OutOfMemoryError
        return real(self, batch, weight)

    monkeypatch.setattr(PackedForward, "__call__", limited)
    saving = final_weights(job_for(tmp_path / "saving", train__micro_batch_tokens=1))
    assert all(torch.equal(saving[name], weight) for name, weight in whole.items())


def test_out_of_memory_with_a_single_row_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self, batch, weight=1.0):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(PackedForward, "__call__", never)
    with pytest.raises(LmtuneError, match=r"single row of .* tokens; lower data.max_length"):
        train(job_for(tmp_path / "run"))


def test_a_step_that_is_not_finite_changes_nothing_and_names_its_rows(tmp_path: Path) -> None:
    job = job_for(tmp_path / "run", train__max_steps=3)
    bad, poison = loop._plan(job, 10**6).step(3).rows[0], 99
    for row in job.data.rows:  # token 99 makes NaN; only row `bad` holds it
        for document in row.documents:
            document.input_ids[document.input_ids == poison] = 5
    job.data[bad].documents[0].input_ids[0] = poison
    job.forward.base.get_input_embeddings().weight.data[poison] = float("nan")
    with pytest.raises(LmtuneError, match=rf"(?s)step 3: .*not finite.*rows.jsonl:{bad + 1}\b"):
        train(job)
    assert all(torch.isfinite(parameter).all() for parameter in trainable(job.forward.model).values())
    saved, _ = newest_checkpoint(job.run.checkpoints)
    assert saved is not None
    assert saved.step == 2
    assert all(torch.isfinite(tensor).all() for tensor in saved.adapter.values())


def test_the_best_step_is_kept_and_patience_ends_the_run(tmp_path: Path) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7, 1.0])

    def validate() -> Accuracies:
        return Accuracies(next(losses), 0.5, 0.5)

    job = job_for(
        tmp_path / "run", validate=validate, evaluation__every_steps=1, evaluation__patience=2,
        run__keep_checkpoints=1,
    )  # fmt: skip
    outcome = train(job)
    assert outcome.stopped_early
    assert (outcome.counters.step, outcome.counters.best_step) == (4, 2)
    best = loop.load_checkpoint(job.run.checkpoints / "step-000002")
    assert all(torch.equal(p, best.adapter[n]) for n, p in trainable(job.forward.model).items())


def test_every_step_is_recorded_once_even_after_a_resume(tmp_path: Path) -> None:
    job = job_for(tmp_path / "run", run__checkpoint_every_steps=2, run__keep_checkpoints=10)
    train(job)
    resumed = loop.load_checkpoint(job.run.checkpoints / "step-000004")
    train(job_for(tmp_path / "run", resumed=resumed))
    metrics = job.run.metrics.read_text().splitlines()
    results = job.run.results.read_text().splitlines()
    assert [line.split('"step": ')[1].split(",")[0] for line in metrics] == ["1", "2", "3", "4", "5", "6"]
    assert [line.split(",")[0] for line in results] == ["step", "1", "2", "3", "4", "5", "6"]
