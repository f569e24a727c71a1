"""One of several machines is cut off, or its process killed: all end and say why, and the same command goes on.

The machines are network namespaces. Most tests start one process on each, as a launcher would; the last ones start
`accelerate launch` and `torchrun` there.
"""

import json
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import lmtune.training.machines
from tests.machines import LAUNCHERS, launched, network
from tests.processes import KILL, at_call, at_step, ended, said
from tests.processes import lmtune as run_lmtune
from tests.workplace import RESTLESS, lasting, make_workplace, trained_weights, write_config, write_rows

ROOT = Path(__file__).parents[2]
LIMIT = "run.process_timeout_seconds=12"  # and for the network half of it
# Another number of processes draws another.
WITHOUT_DROPOUT = {key: value for key, value in RESTLESS.items() if key != "tuning__dropout"}
COMMAND = ("finetune", "run.yaml", LIMIT)
LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp": {"parallel__kind": "fsdp"},
    "full tuning under fsdp": {"parallel__kind": "fsdp", "tuning__kind": "full", "train__learning_rate": 1e-3},
    "streamed": {"model__offload": "layers", "model__resident_layers": 1},
}


def codes(processes: Sequence[Any]) -> list[int]:
    return [ended(process) for process in processes]


def messages(place: Path, rank: int) -> list[str]:
    """The first line of each error that a machine showed."""
    return re.findall(r"^error: (.*)$", said(place, f"output{rank}"), re.MULTILINE)


def assert_equal(place: Path, wanted: dict[str, torch.Tensor]) -> None:
    """Up to rounding."""
    found = trained_weights(place / "runs/trial")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


def two_places(folder: Path) -> list[Path]:
    """Disks of two machines, with the same files."""
    places = [make_workplace(folder / name) for name in ("first", "second")]
    for place in places:
        write_config(place, **WITHOUT_DROPOUT)
    return places


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A place for a run that any number of processes makes alike."""
    folder = make_workplace(tmp_path / "plain")
    write_config(folder, **WITHOUT_DROPOUT)
    return folder


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The adapter that one process makes of it."""
    folder = make_workplace(tmp_path_factory.mktemp("one"))
    write_config(folder, **WITHOUT_DROPOUT)
    assert run_lmtune(folder, "finetune", "run.yaml") == 0, said(folder)
    return trained_weights(folder / "runs/trial")


def test_31_a_machine_that_is_cut_off_ends_all_and_the_run_goes_on(
    place: Path, undisturbed_pair: dict[str, Any]
) -> None:
    with network(2) as machines:
        processes = machines.start(place, *COMMAND, troubles={1: at_step(5, machines.cutting(1))})
        assert codes(processes) == [1, 1], said(place, "output0") + said(place, "output1")
        for rank, other in ((0, 1), (1, 0)):
            (message,) = messages(place, rank)
            assert message.startswith(f"rank {other} on machine{other} cannot be reached: no answer for 6 s")
        assert machines.pids() == []
        summary = json.loads((place / "runs/trial/summary.json").read_text())
        assert (summary["status"], summary["reason"]) == ("failed", messages(place, 0)[0])
        machines.mend(1)
        assert codes(machines.start(place, *COMMAND)) == [0, 0], said(place, "output0")
    assert "resumes after step 4" in said(place, "output0")
    assert lasting(place) == undisturbed_pair


@pytest.mark.long
def test_31_the_others_learn_which_machine_is_cut_off(plain: Path, of_one_process: dict[str, torch.Tensor]) -> None:
    """And two machines go on, then one."""
    with network(3) as machines:
        processes = machines.start(plain, *COMMAND, troubles={1: at_step(5, machines.cutting(1))})
        assert codes(processes) == [1, 1, 1], said(plain, "output0")
        who = [messages(plain, rank)[0].split(" cannot be reached")[0] for rank in range(3)]
        assert who == ["rank 1 on machine1", "rank 0 on machine0", "rank 1 on machine1"]
        machines.mend(1)
        processes = machines.start(plain, *COMMAND, troubles={1: at_step(7, KILL)}, count=2)
        assert codes(processes) == [1, -signal.SIGKILL]
        assert "resumes after step 4" in said(plain, "output0")
        assert codes(machines.start(plain, *COMMAND, count=1)) == [0]
    assert "resumes after step 6" in said(plain, "output0")
    assert_equal(plain, of_one_process)


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 3])
def test_31_a_cut_that_is_short_is_survived(plain: Path, of_one_process: dict[str, torch.Tensor], count: int) -> None:
    """So are machines without one: they make what one process makes."""
    with network(count) as machines:
        processes = machines.start(plain, *COMMAND, troubles={1: at_step(5, machines.cutting(1))})
        while not said(plain, "output0").count("step 4: validation loss"):
            time.sleep(0.1)
        time.sleep(2)
        machines.mend(1)
        assert codes(processes) == [0] * count, said(plain, "output0")
    assert_equal(plain, of_one_process)


@pytest.mark.long
@pytest.mark.parametrize("killed", [0, 1])
def test_16_a_process_of_another_machine_is_killed(
    plain: Path, of_one_process: dict[str, torch.Tensor], killed: int
) -> None:
    with network(3) as machines:
        processes = machines.start(plain, *COMMAND, troubles={killed: at_step(5, KILL)}, count=2)
        wanted = [1, 1]
        wanted[killed] = -signal.SIGKILL
        assert codes(processes) == wanted
        assert messages(plain, 1 - killed) == [
            f"rank {1 - killed}: rank {killed} on machine{killed} exited during step 5; what it printed there says why"
        ]
        assert codes(machines.start(plain, *COMMAND)) == [0, 0, 0], said(plain, "output0")
    assert "resumes after step 4" in said(plain, "output0")
    assert_equal(plain, of_one_process)


@pytest.mark.long
def test_16_a_process_that_ends_before_the_machines_have_met(plain: Path) -> None:
    """The others wait as long as machines may take to start: a minute with this limit, 15 with that of a user."""
    trouble = at_call("lmtune.parallel.launch", "check_world", KILL)
    with network(2) as machines:
        command = ("finetune", "run.yaml", "run.process_timeout_seconds=1")
        assert codes(machines.start(plain, *command, troubles={1: trouble})) == [1, -signal.SIGKILL]
    (message,) = messages(plain, 0)
    assert message.startswith("rank 0: 2 processes did not meet at machine0, port 29500 within 62 s: ")
    assert not (plain / "runs").exists()


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_16_and_31_machines_that_share_a_base_out(tmp_path: Path, layout: str) -> None:
    """One is cut off while a layer is gathered, then one is killed; three machines go on, and then one."""
    settings = {**WITHOUT_DROPOUT, **LAYOUTS[layout]}
    places = [make_workplace(tmp_path / name) for name in ("one", "several")]
    for folder in places:
        write_config(folder, **settings)
    alone, place = places
    assert run_lmtune(alone, "finetune", "run.yaml") == 0, said(alone)
    with network(3) as machines:
        processes = machines.start(place, *COMMAND, troubles={1: at_step(3, machines.cutting(1))}, count=2)
        assert codes(processes) == [1, 1], said(place, "output0") + said(place, "output1")
        for rank, other in ((0, 1), (1, 0)):
            assert messages(place, rank)[0].startswith(f"rank {other} on machine{other} cannot be reached: no answer")
        assert machines.pids() == []
        machines.mend(1)
        processes = machines.start(place, *COMMAND, troubles={1: at_step(5, KILL)})
        assert codes(processes) == [1, -signal.SIGKILL, 1], said(place, "output0")
        assert "rank 1 on machine1 exited during step 5" in messages(place, 0)[0]
        assert "resumes after step 2" in said(place, "output0")
        assert codes(machines.start(place, *COMMAND, count=1)) == [0], said(place, "output0")
    assert "resumes after step 4" in said(place, "output0")
    assert_equal(place, trained_weights(alone / "runs/trial"))


def be_impatient() -> None:
    """Wait a second for a file to appear, not as long as a network file system may take."""
    lmtune.training.machines.SEEN_SECONDS = 1.0


@pytest.mark.long
def test_32_machines_that_do_not_share_the_runs_folder_are_refused(tmp_path: Path) -> None:
    """Before the first step: who resumes, and who reads the best step at the end, needs it."""
    folders = two_places(tmp_path)
    (folders[1] / "runs").mkdir()
    with network(2) as machines:
        processes = machines.start(tmp_path, *COMMAND, folders=folders, troubles={1: be_impatient})
        assert codes(processes) == [2, 2]
    for rank, folder in enumerate(folders):
        (message,) = messages(folder, rank)
        assert message.startswith("run.dir: runs: rank 1 on machine1 has another folder of this name than rank 0")
    assert not (folders[0] / "runs").exists()


@pytest.mark.long
def test_32_machines_with_other_rows_are_refused(tmp_path: Path) -> None:
    folders = two_places(tmp_path)
    write_rows(folders[1] / "train.jsonl", [{"prompt": "What?", "completion": f"{n}"} for n in range(24)])
    with network(2) as machines:
        assert codes(machines.start(tmp_path, *COMMAND, folders=folders)) == [2, 2]
    for rank, folder in enumerate(folders):
        assert "rank 1 on machine1 has others than rank 0 on machine0" in messages(folder, rank)[0]
        assert "the rows' tokens" in said(folder, f"output{rank}")
    assert not (folders[0] / "runs").exists()


# --- through the launchers


def finished(launchers: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Their exit codes."""
    return [launcher.wait(timeout=120) for launcher in launchers]


@pytest.mark.long
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_16_and_31_the_same_through_launchers(
    plain: Path, of_one_process: dict[str, torch.Tensor], launcher: str
) -> None:
    with network(2) as machines:
        trouble = at_step(3, machines.cutting(1))
        assert finished(launched(machines, plain, launcher, LIMIT, trouble=trouble)) == [1, 1]
        for rank, other in ((0, 1), (1, 0)):
            assert messages(plain, rank)[0].startswith(f"rank {other} on machine{other} cannot be reached")
        assert machines.pids() == []
        machines.mend(1)
        assert finished(launched(machines, plain, launcher, LIMIT, trouble=at_step(5, KILL))) == [1, 1]
        assert "rank 1 on machine1 exited during step 5" in messages(plain, 0)[0]
        assert "SIGKILL" in said(plain, "output1") or "exitcode: -9" in said(plain, "output1")
        assert machines.pids() == []
        assert finished(launched(machines, plain, launcher, LIMIT)) == [0, 0], said(plain, "output0")
    assert "resumes after step 4" in said(plain, "output0")
    assert_equal(plain, of_one_process)
