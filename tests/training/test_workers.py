"""Processes: as many run as were asked for, their exit codes come through, and two give the adapter that one gives."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lmtune.config.schema import ReplicatedConfig
from lmtune.config.yaml import write_yaml
from lmtune.errors import ConfigError
from lmtune.models.device import default_device
from lmtune.parallel import replicated
from lmtune.parallel.launch import _failure, _stopped, connect
from lmtune.parallel.worker import check_world, is_worker, note_exit_code
from tests.workplace import environment, finetune, make_workplace, tree_of

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
WORLD = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "ACCELERATE_USE_CPU")


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's variables."""
    for name in (*WORLD, "LMTUNE_NUM_PROCESSES", "LMTUNE_EXIT_CODES", "LMTUNE_PARENT_PID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "variables",
    [
        {}, {"LMTUNE_NUM_PROCESSES": "1"}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "LMTUNE_NUM_PROCESSES": "2"},
        {"ACCELERATE_USE_CPU": "true"}, {"WORLD_SIZE": "2", "MASTER_PORT": "1", "ACCELERATE_USE_CPU": "true"},
    ],
)  # fmt: skip
def test_the_world_that_was_asked_for(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check_world()
    assert is_worker() == ("WORLD_SIZE" in variables)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LMTUNE_NUM_PROCESSES": "2"}, "--processes: 2 processes were asked for, 1 are running"),
        ({"LMTUNE_NUM_PROCESSES": "2", "WORLD_SIZE": "4"}, "--processes: 2 processes were asked for, 4 are running"),
        ({"ACCELERATE_USE_CPU": "true", "MASTER_PORT": "29500"}, "its --cpu option does that"),
    ],
)
def test_another_world_is_refused(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        check_world()


def test_no_setting_of_another_project_is_left(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_MODE": "default", "ACCELERATE_USE_CPU": "True"}
    meant = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_LOG_LEVEL": "x"}
    stray = {"LOCAL_RANK": "0", "PMI_SIZE": "4"}
    for name, value in {**plain, **meant, **stray}.items():
        monkeypatch.setenv(name, value)
    check_world()
    assert [name for name in (*plain, *meant, *stray) if name in os.environ] == ["ACCELERATE_USE_CPU"]
    said = " ".join(capfd.readouterr().err.split())
    assert "warning: ACCELERATE_DYNAMO_BACKEND, ACCELERATE_LOG_LEVEL, ACCELERATE_USE_DEEPSPEED: ignored; lmtune" in said
    check_world()
    assert capfd.readouterr().err == ""


def test_every_verb_computes_on_the_same_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate would take Apple's `mps` of itself; what `plan` and `chat` take is what it is given."""
    asked: list[bool] = []

    def accelerator(cpu: bool, **settings: object) -> None:
        asked.append(cpu)
        raise RuntimeError("no group here")

    monkeypatch.setattr(replicated, "Accelerator", accelerator)
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(replicated, "default_device", lambda device=device: torch.device(device))
        with pytest.raises(RuntimeError, match="no group here"):
            replicated.Replicated(60)
    assert asked == [True, False]
    assert connect(ReplicatedConfig(), 60).device == default_device() == torch.device("cpu")


@pytest.mark.parametrize(
    ("variables", "device"),
    [({}, "cuda:0"), ({"LOCAL_RANK": "3"}, "cuda:1"), ({"ACCELERATE_USE_CPU": "yes"}, "cpu")],
)  # fmt: skip
def test_a_gpu_is_taken_unless_the_cpu_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert default_device() == torch.device(device)


def test_an_exit_code_is_noted_only_where_somebody_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note_exit_code(3)
    monkeypatch.setenv("LMTUNE_EXIT_CODES", str(tmp_path / "codes"))
    note_exit_code(3)
    note_exit_code(0)
    assert (tmp_path / "codes").read_text() == "3\n0\n"


@pytest.mark.parametrize(
    ("noted", "code"),
    [([2, 2], 2), ([0, 2], 2), ([143, 2], 2), ([], 1), ([143], 1), ([143, 143], 143), ([1, 2], 1), ([0, 143], 1)],
)
def test_of_several_exit_codes_that_of_the_first_failure_counts(noted: list[int], code: int) -> None:
    assert _failure(noted, 2) == code


FOLLOWS = "import time; from lmtune.parallel.launch import exit_with_parent; exit_with_parent(); time.sleep(60)"


def test_a_process_whose_starter_had_gone_before_it_looked_stops_too() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    variables = {**os.environ, "LMTUNE_PARENT_PID": str(gone.pid)}
    done = subprocess.run([sys.executable, "-c", FOLLOWS], cwd=ROOT, env=variables, timeout=30, check=False)
    assert done.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("noted", "received", "code"),
    [([143, 143], [15], 143), ([143, 143], [2], 130), ([143], [15, 2], 143), ([0, 0], [15], 0), ([0], [15], 143),
     ([143, 143], [], 1), ([0, 0], [], 0), ([], [], 1)],
)  # fmt: skip
def test_a_run_that_ended_well_has_ended_well_though_it_was_to_stop(
    noted: list[int], received: list[int], code: int
) -> None:
    assert _stopped(noted, 2, received) == code


# --- the whole thing


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace with a run `one` of one process."""
    folder = make_workplace(tmp_path_factory.mktemp("work"))
    (folder / "run.yaml").write_text(write_yaml(tree_of(run__checkpoint_every_steps=4)))
    finetune(folder, run__name="one", run__checkpoint_every_steps=4)
    return folder


def tuned(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The final adapter of a run."""
    return load_file(folder / "runs" / name / "adapter" / "adapter_model.safetensors")


def assert_same_run(folder: Path, name: str) -> None:
    """Adapter, records and scores are those of one process, but for rounding."""
    import csv
    import json

    one, other = tuned(folder, "one"), tuned(folder, name)
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, atol=1e-5, rtol=0)
    rows = []
    for run in ("one", name):
        with (folder / "runs" / run / "results.csv").open(newline="") as file:
            rows.append([[float(cell or 0) for cell in row.values()] for row in csv.DictReader(file)])
    torch.testing.assert_close(torch.tensor(rows[0]), torch.tensor(rows[1]), atol=1e-4, rtol=1e-4)
    first, second = (json.loads((folder / "runs" / run / "summary.json").read_text()) for run in ("one", name))
    assert (first["processes"], second["processes"]) == (1, 2)
    for part in ("base", "tuned"):
        assert second[part] == pytest.approx(first[part], abs=1e-5)
    answers = [(folder / "runs" / run / "predictions.jsonl").read_text() for run in ("one", name)]
    assert answers[0] == answers[1]


def command(folder: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """A command in `folder`."""
    return subprocess.run(
        arguments, cwd=folder, env=environment(folder, **variables), capture_output=True, text=True, check=False,
        timeout=200,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_give_the_adapter_of_one(place: Path) -> None:
    """Whatever `accelerate config` wrote for another project."""
    home = place / "hub" / "accelerate"
    home.mkdir(parents=True)
    (home / "default_config.yaml").write_text(
        "compute_environment: AMAZON_SAGEMAKER\ndistributed_type: DEEPSPEED\nmixed_precision: fp8\n"
    )
    leftovers = {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_FP8_BACKEND": "MSAMP", "HF_HOME": str(place / "hub")}
    done = command(
        place, sys.executable, "-m", "lmtune", "finetune", "run.yaml", "run.name=two", "--processes", "2", **leftovers
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Exact match") == 1
    assert done.stderr.count("the adapter is in runs/two/adapter") == 1
    assert_same_run(place, "two")


@pytest.mark.long
def test_accelerate_launch_gives_it_too_and_goes_on_with_a_run_of_one_process(place: Path) -> None:
    """Half of the run in one process, the rest in two."""
    import shutil

    finetune(place, run__name="three", run__checkpoint_every_steps=4)
    run = place / "runs" / "three"
    shutil.rmtree(run / "checkpoints" / "step-000008")
    shutil.rmtree(run / "adapter")
    recipe = str(ROOT / "recipes" / "finetune.py")
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    options += ["--dynamo_backend", "no", "--main_process_port", "29611"]
    done = command(place, *LAUNCH, *options, recipe, "run.yaml", "run.name=three", ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert "resumes after step 4" in done.stderr
    assert_same_run(place, "three")
