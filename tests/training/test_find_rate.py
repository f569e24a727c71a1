"""`train.learning_rate: find`: the run is that with the rate it found, from its first step and when it is resumed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lmtune.config.load import load_config
from lmtune.config.schema import FinetuneConfig
from lmtune.errors import LmtuneError
from lmtune.runs.store import RunDirectory
from lmtune.training import find_rate
from lmtune.training.find_rate import choose, rates
from lmtune.training.run import run_finetune
from tests.workplace import RESTLESS, config_of, inside, lasting, make_workplace

pytestmark = pytest.mark.slow  # seconds together; left out of `make test-fast`


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return make_workplace(tmp_path / "work")


def train(place: Path, **changes: Any) -> RunDirectory:
    settings = {key: value for key, value in RESTLESS.items() if not key.startswith("tuning__")}
    config = config_of(**{**settings, **changes})
    with inside(place):
        run_finetune(config, RunDirectory.of(config.run))
    return RunDirectory(place / "runs" / config.run.name)


@pytest.mark.parametrize(
    "kind",
    [{"tuning__dropout": 0.3}, {"tuning__kind": "full"}, {"tuning__kind": "partial", "tuning__parts": ("head",)}],
)  # fmt: skip
def test_the_run_is_that_with_the_rate_found_and_resumes_as_it(
    place: Path, kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = train(place, train__learning_rate="find", **kind)
    found = load_config(FinetuneConfig, run.config).train.learning_rate
    assert isinstance(found, float)
    assert 1e-6 < found < 1
    assert f"train.learning_rate: found {found:g} by a range test of" in capfd.readouterr().err
    assert (run.path / "learning-rate.svg").read_text().endswith("</svg>\n")
    train(place, train__learning_rate=found, run__name="named", **kind)
    whole, named = lasting(place), lasting(place, "named")
    assert whole["metrics"] == named["metrics"]
    assert whole["scores"] == named["scores"]
    shutil.rmtree(run.checkpoints / "step-000008")
    run.summary.write_text(json.dumps({**json.loads(run.summary.read_text()), "status": "running", "tuned": None}))
    shutil.rmtree(run.adapter, ignore_errors=True)
    shutil.rmtree(run.merged, ignore_errors=True)
    monkeypatch.setattr(find_rate, "range_test", None)  # the rate is known
    train(place, train__learning_rate="find", **kind)
    assert lasting(place) == whole


def test_what_is_chosen_is_a_tenth_of_the_rate_of_the_least_loss() -> None:
    changes = tuple(-abs(1 - abs(step - 40) / 40) for step in range(50))
    assert choose(rates(), changes) == pytest.approx(rates()[40] / 10, rel=0.05)
    with pytest.raises(LmtuneError, match="no rate made the loss fall"):
        choose(rates(), (0.0, 0.1, 0.2))
