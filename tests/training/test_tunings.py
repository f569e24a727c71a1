"""Whatever learns, a step is defined by its examples, and a resumed run is the same bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lmtune.errors import ConfigError
from lmtune.runs.store import checkpoint_folders
from lmtune.training.checkpoint import load_checkpoint
from lmtune.training.optim import check_optimizer
from tests.jobs import final_weights, job_for
from tests.tiny import tiny_model

TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "partial": {"kind": "partial", "parts": ["head", "norms", "last_1_layers"]},
    "lora_plus": {"rank": 4, "alpha": 8, "lora_plus_ratio": 16},
    "modules_to_save": {"rank": 4, "alpha": 8, "dropout": 0.3, "modules_to_save": ["head", "norm"]},
}  # fmt: skip
each_tuning = pytest.mark.parametrize("name", TUNINGS)
# AdamW moves a weight by about the learning rate in a step, also one whose gradient is all rounding
SETTINGS: dict[str, Any] = {"train__weight_decay": 0.1, "train__learning_rate": 1e-4}


@each_tuning
def test_micro_batches_of_any_size_give_the_same_weights(tmp_path: Path, name: str) -> None:
    job = job_for(tmp_path / "whole", tuning=TUNINGS[name], **SETTINGS)
    before = {key: parameter.detach().clone() for key, parameter in job.trainable.items()}
    whole = final_weights(job)
    assert not any(torch.equal(weight, before[key]) for key, weight in whole.items())
    if TUNINGS[name].get("dropout"):  # is drawn anew in another micro-batch
        return
    for budget in (1, 50, 120):
        cut = job_for(tmp_path / f"cut{budget}", tuning=TUNINGS[name], train__micro_batch_tokens=budget, **SETTINGS)
        for key, weight in final_weights(cut).items():
            torch.testing.assert_close(weight, whole[key], atol=1e-5, rtol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@each_tuning
def test_resuming_from_any_step_is_bitwise_the_same(tmp_path: Path, name: str, optimizer: str) -> None:
    settings = {
        "run__checkpoint_every_steps": 1,
        "run__keep_checkpoints": 10,
        "train__optimizer": optimizer,
        **SETTINGS,
    }
    whole = final_weights(job_for(tmp_path / "whole", tuning=TUNINGS[name], **settings))
    for path in checkpoint_folders(tmp_path / "whole" / "checkpoints")[:-1]:
        resumed = load_checkpoint(path)
        folder = tmp_path / f"from{resumed.step}"
        again = final_weights(job_for(folder, resumed=resumed, tuning=TUNINGS[name], **settings))
        assert all(torch.equal(again[key], weight) for key, weight in whole.items()), path.name


def test_moments_in_8_bit_train_almost_as_those_in_32(tmp_path: Path) -> None:
    settings = {"tuning": TUNINGS["full"], "train__learning_rate": 1e-3}
    start = {key: weight.detach().clone() for key, weight in job_for(tmp_path / "0", **settings).trainable.items()}
    wide = final_weights(job_for(tmp_path / "32", **settings))
    job = job_for(tmp_path / "8", train__optimizer="adamw_8bit", **settings)
    narrow = final_weights(job)
    moved, apart = (
        torch.cat([(one[key] - other[key]).flatten() for key in start]).norm()
        for one, other in ((wide, start), (wide, narrow))
    )
    assert 0 < apart < 0.2 * moved
    saved = load_checkpoint(checkpoint_folders(job.run.checkpoints)[-1]).optimizer
    assert saved["state1.model.embed_tokens.weight"].dtype == torch.uint8


def test_an_optimizer_that_does_not_work_here_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import bitsandbytes

    def wrong(groups: Any, **settings: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=0.0, maximize=True)

    for broken, said in ((wrong, "a step gave a wrong result"), (None, "NoneType")):
        monkeypatch.setattr(bitsandbytes.optim, "AdamW8bit", broken)
        with pytest.raises(ConfigError, match=rf"train\.optimizer: adamw_8bit does not work .*{said}.*: adamw"):
            check_optimizer("adamw_8bit", torch.device("cpu"))


@pytest.mark.parametrize("name", ["full", "partial"])
def test_what_is_not_trained_stays_as_it_was(tmp_path: Path, name: str) -> None:
    model = tiny_model()
    job = job_for(tmp_path, tuning=TUNINGS[name], model=model, **SETTINGS)
    final_weights(job)
    for key, parameter in tiny_model().named_parameters():
        now = job.parts.model.base.get_parameter(key)
        assert torch.equal(now, parameter) is (key not in job.trainable), key
