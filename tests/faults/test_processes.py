"""One of several processes is stopped, killed, fails, hangs or leaves: the job ends, says why, and can be resumed.

Most tests run two processes that meet as under a launcher. The last ones go through `accelerate launch`, as
`lmtune finetune --processes 2` does; starting it takes ten seconds.
"""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lmtune.training.checkpoint import checkpoint_folders, problem_of
from tests.processes import (
    KILL,
    Trouble,
    all_of,
    at_call,
    at_step,
    ended,
    said,
    send,
    started_together,
    together,
)
from tests.workplace import environment, lasting

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "tests" / "faults" / "recipe.py")
LAUNCH = "import os, sys; from pathlib import Path; from lmtune.parallel.launch import launch; "
LAUNCH += f"Path('command').write_text(str(os.getpid())); sys.exit(launch(Path({RECIPE!r}), sys.argv[1:], 2))"


def reason(place: Path) -> str:
    """Why the run failed, in its summary."""
    summary = json.loads((place / "runs/trial/summary.json").read_text())
    assert summary["status"] == "failed"
    return str(summary["reason"])


def messages(place: Path, rank: int) -> list[str]:
    """The first line of each error that a process showed."""
    return re.findall(r"^error: (.*)$", said(place, f"output{rank}"), re.MULTILINE)


def assert_goes_on(place: Path, undisturbed_pair: dict[str, Any]) -> None:
    """The same command ends bit for bit like the run that nothing disturbed, and damaged nothing on its way."""
    assert all(problem_of(path) is None for path in checkpoint_folders(place / "runs/trial/checkpoints"))
    assert together(place, "finetune", "run.yaml") == [0, 0], said(place, "output0")
    assert "resumes after step" in said(place, "output0")
    assert lasting(place) == undisturbed_pair


def test_06_a_sigterm_to_one_process_stops_both(place: Path, undisturbed_pair: dict[str, Any]) -> None:
    codes = together(place, "finetune", "run.yaml", troubles={1: at_step(5, send(signal.SIGTERM))})
    assert codes == [143, 143]
    assert problem_of(place / "runs/trial/checkpoints/step-000005") is None
    assert messages(place, 0) == messages(place, 1)
    assert messages(place, 0)[0].startswith("stopped after step 5 of 8, which is saved")
    assert_goes_on(place, undisturbed_pair)


def test_16_one_process_is_killed_and_the_other_ends(place: Path, undisturbed_pair: dict[str, Any]) -> None:
    began = time.monotonic()
    assert together(place, "finetune", "run.yaml", troubles={1: at_step(5, KILL)}) == [1, -signal.SIGKILL]
    assert time.monotonic() - began < 30
    wanted = "rank 0: a peer exited during step 5; the other process, or the launcher, says why"
    assert messages(place, 0) == [wanted]
    assert_goes_on(place, undisturbed_pair)


def fail() -> None:
    """Something unforeseen."""
    raise ValueError("this is the cause")


def test_17_the_cause_in_one_process_is_what_it_says(place: Path) -> None:
    assert together(place, "finetune", "run.yaml", troubles={1: at_step(5, fail)}) == [1, 1]
    assert messages(place, 1) == ["ValueError: this is the cause"]
    assert len(messages(place, 0)) == 1
    assert "a peer exited during step" in messages(place, 0)[0]
    assert "Traceback" not in said(place, "output0") + said(place, "output1")


def hang() -> None:
    """Never come back."""
    time.sleep(1000)


def test_18_a_process_that_hangs_is_named_within_the_limit(place: Path, undisturbed_pair: dict[str, Any]) -> None:
    limit = "run.process_timeout_seconds=5"
    began = time.monotonic()
    assert together(place, "finetune", "run.yaml", limit, troubles={0: at_step(5, hang)}) == [1, 1]
    assert time.monotonic() - began < 30
    wanted = "collective timed out after 5 s (run.process_timeout_seconds); missing ranks: 0 (phase: step 5)"
    assert (messages(place, 0), messages(place, 1)) == ([], [wanted])
    assert reason(place) == wanted
    assert_goes_on(place, undisturbed_pair)


def compute(seconds: float) -> None:
    """Work as hard as quantizing does."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        sum(range(10_000))


def test_18_a_process_that_works_longer_than_the_limit_is_waited_for(
    place: Path, undisturbed_pair: dict[str, Any]
) -> None:
    """Tokenizing (as on a disk that answers late), quantizing, saving a checkpoint and the result."""
    slow = all_of(
        at_call("lmtune.training.compose", "load_data", partial(time.sleep, 5)),
        at_call("lmtune.training.compose", "load_model", partial(compute, 5)),
        at_call("lmtune.training.hooks", "save_checkpoint", partial(compute, 5)),
        at_step(3, partial(time.sleep, 2)),  # for which the other one has waited since that checkpoint
        at_call("lmtune.training.run", "save_tuned", partial(compute, 5)),
    )
    limit = "run.process_timeout_seconds=3"
    assert together(place, "finetune", "run.yaml", limit, troubles={0: slow}) == [0, 0], said(place, "output1")
    assert lasting(place) == undisturbed_pair


def stop() -> None:
    """Be there, and do nothing any more, not even say so."""
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.long
def test_18_a_process_that_is_dead_while_the_others_wait_for_it_is_named(place: Path) -> None:
    dead = at_call("lmtune.training.compose", "load_model", stop)
    limit = "run.process_timeout_seconds=2"
    processes = started_together(place, "finetune", "run.yaml", limit, troubles={1: dead})
    try:
        assert ended(processes[0]) == 1
        assert messages(place, 0)[0].endswith("missing ranks: 1 (phase: start)")
    finally:
        processes[1].kill()


def leave() -> None:
    """End as if all were done."""
    sys.exit(0)


def vanish() -> None:
    """End without a word to anybody."""
    os._exit(0)


def test_19_one_process_that_ends_early_with_0_fails_the_other(place: Path, undisturbed_pair: dict[str, Any]) -> None:
    assert together(place, "finetune", "run.yaml", troubles={1: at_step(5, vanish)}) == [1, 0]
    assert "a peer exited during step" in messages(place, 0)[0]
    assert_goes_on(place, undisturbed_pair)


def test_19_the_first_process_may_not_leave_before_the_result_is_saved(place: Path) -> None:
    """When no step is left to meet for."""
    codes = together(place, "finetune", "run.yaml", troubles={0: at_call("lmtune.runs.cards", "adapter_card", leave)})
    assert codes == [0, 1]
    assert "during scoring and saving the result" in messages(place, 1)[0]


# --- through the launcher


def launched(
    place: Path, rank: int, trouble: Trouble, *settings: str, **variables: str
) -> "tuple[subprocess.CompletedProcess[str], float]":
    """`lmtune finetune --processes 2` with trouble for one of them, and for how long it went on after that."""
    variables |= {"TROUBLE": pickle.dumps(trouble).hex(), "RANK_IN_TROUBLE": str(rank), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, "run.yaml", *settings],
        cwd=place,
        env=environment(place, **variables),
        text=True,
        capture_output=True,
        check=False,
        timeout=200,
        start_new_session=True,  # as a terminal gives each command a process group of its own
    )
    return done, time.time() - (place / "trouble").stat().st_mtime


def marked(trouble: Trouble) -> None:
    """Note when the trouble begins."""
    Path("trouble").touch()
    trouble()


@pytest.mark.long
def test_16_a_job_with_a_killed_process_ends_within_half_a_minute(place: Path) -> None:
    done, seconds = launched(place, 1, at_step(5, partial(marked, KILL)))
    assert done.returncode == 1
    assert seconds < 30
    assert "error: process 1 was ended by SIGKILL; perhaps the memory was full" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_19_a_job_of_which_one_process_left_early_has_failed(place: Path) -> None:
    """After the last meeting, so that only the launcher can notice: it counts who finished."""
    trouble = at_call("lmtune.run", "note_exit_code", partial(marked, vanish))
    done, _ = launched(place, 1, trouble)
    assert done.returncode == 1
    assert "error: 1 of 2 processes ended before their work" in done.stderr


@pytest.mark.parametrize(
    ("trouble", "code", "first", "rank"),
    [
        pytest.param(send(signal.SIGTERM), 143, "stopped after step 5 of 8, which is saved", 1, marks=pytest.mark.long),
        pytest.param(KILL, 1, "a peer exited|process . was ended by SIGKILL", 0, marks=pytest.mark.long),
        (fail, 1, "ValueError: this is the cause", 1),
        pytest.param(hang, 1, r"missing ranks: . \(phase: step 5\)", 0, marks=pytest.mark.long),
        pytest.param(vanish, 1, "a peer exited during step", 1, marks=pytest.mark.long),
    ],
    ids=["06", "16", "17", "18", "19"],
)
def test_the_same_through_the_launcher(place: Path, trouble: Trouble, code: int, first: str, rank: int) -> None:
    limit = ["run.process_timeout_seconds=5"] if trouble is hang else []
    done, seconds = launched(place, rank, at_step(5, partial(marked, trouble)), *limit)
    assert done.returncode == code, done.stderr
    assert seconds < 30
    assert re.search(first, re.findall(r"^error: (.*)$", done.stderr, re.MULTILINE)[0]), done.stderr
    assert "Traceback" not in done.stderr


def stop_command(number: int) -> None:
    """Ask the command that started all to stop, as a scheduler does."""
    os.kill(int(Path("command").read_text()), number)


def press_ctrl_c() -> None:
    """What a terminal does: the signal goes to every process of the command's group."""
    os.killpg(int(Path("command").read_text()), signal.SIGINT)


def kill_launcher() -> None:
    """As the kernel does where memory is full."""
    os.kill(os.getppid(), signal.SIGKILL)


def assert_saved_by_both(place: Path, done: "subprocess.CompletedProcess[str]") -> None:
    """Both processes finished step 5 and said so."""
    assert done.stderr.count("error: stopped after step 5 of 8, which is saved") == 2, done.stderr
    assert problem_of(place / "runs/trial/checkpoints/step-000005") is None
    assert "Traceback" not in done.stderr


@pytest.mark.long
@pytest.mark.parametrize(
    ("ask", "code", "limit", "seconds"),
    [
        (partial(stop_command, signal.SIGTERM), 143, {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"}, 4),
        (press_ctrl_c, 130, {}, 35),
    ],
    ids=["SIGTERM", "Ctrl-C, torch's own limit"],
)
def test_03_and_05_a_stop_waits_for_a_step_that_takes_longer_than_the_launcher_would(
    place: Path, undisturbed_pair: dict[str, Any], ask: Trouble, code: int, limit: dict[str, str], seconds: float
) -> None:
    trouble = at_step(5, all_of(partial(marked, ask), partial(time.sleep, seconds)))
    done, _ = launched(place, 1, trouble, **limit)
    assert done.returncode == code, done.stderr
    assert_saved_by_both(place, done)
    assert_goes_on(place, undisturbed_pair)


@pytest.mark.long
def test_03_a_stop_in_the_last_step_lets_all_processes_finish(place: Path, undisturbed_pair: dict[str, Any]) -> None:
    done, _ = launched(place, 1, at_step(8, partial(marked, partial(stop_command, signal.SIGTERM))))
    assert done.returncode == 0, done.stderr
    assert lasting(place) == undisturbed_pair


@pytest.mark.long
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_04_a_second_signal_to_the_command(
    place: Path, undisturbed_pair: dict[str, Any], second: signal.Signals
) -> None:
    """A second Ctrl-C does not wait for a step that never ends; a second SIGTERM changes nothing."""
    rest = partial(time.sleep, 1000 if second == signal.SIGINT else 2)
    ask = partial(stop_command, second)
    trouble = at_step(5, all_of(partial(marked, ask), partial(time.sleep, 1), ask, rest))
    done, seconds = launched(place, 1, trouble)
    assert done.returncode == 128 + second, done.stderr
    assert seconds < 30
    if second == signal.SIGTERM:
        assert_saved_by_both(place, done)
    assert_goes_on(place, undisturbed_pair)


@pytest.mark.long
def test_16_the_launcher_is_killed_and_its_processes_save_their_step(
    place: Path, undisturbed_pair: dict[str, Any]
) -> None:
    trouble = at_step(5, all_of(partial(marked, kill_launcher), partial(time.sleep, 4)))
    done, seconds = launched(place, 1, trouble)
    assert done.returncode == 1, done.stderr
    assert seconds < 30
    assert "error: the launcher was ended by SIGKILL; perhaps the memory was full" in done.stderr
    assert "frame #" not in done.stderr, done.stderr  # of C++
    assert_saved_by_both(place, done)
    assert_goes_on(place, undisturbed_pair)


@pytest.mark.long
def test_16_the_command_is_killed_and_its_processes_save_their_step(
    place: Path, undisturbed_pair: dict[str, Any]
) -> None:
    kill = partial(stop_command, signal.SIGKILL)
    done, seconds = launched(place, 1, at_step(5, all_of(partial(marked, kill), partial(time.sleep, 4))))
    assert done.returncode == -signal.SIGKILL
    assert seconds < 30
    assert_saved_by_both(place, done)
    assert_goes_on(place, undisturbed_pair)
