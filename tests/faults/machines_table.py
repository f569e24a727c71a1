"""The table of docs/several-gpus.md: each fault of a run on two machines, with the limits that users have.

python -m tests.faults.machines_table          as root; ten minutes

What each machine said is in `output0` and `output1` of the folders below build/machines.
"""

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.machines import Machines, launched, network
from tests.processes import KILL, Trouble, all_of, at_step, said, send
from tests.workplace import RESTLESS, make_workplace, write_config

PLACE = Path("build/machines").absolute()
CASES = ("cable pulled", "rank 1 killed", "rank 0 killed", "SIGTERM to rank 1", "launcher killed")


def place_for(name: str) -> Path:
    """A new folder, with a run that any number of processes makes alike."""
    folder = PLACE / re.sub(r"\W", "-", name)
    shutil.rmtree(folder, ignore_errors=True)
    make_workplace(folder)
    write_config(folder, **{**RESTLESS, "tuning__dropout": 0.0})
    return folder


def trouble_of(case: str, machines: Machines, place: Path) -> tuple[int, Trouble]:
    """The rank that is in trouble at step 5, and what it is."""
    actions = {
        "cable pulled": machines.cutting(1), "SIGTERM to rank 1": send(signal.SIGTERM),
        "launcher killed": partial(time.sleep, 5),
    }  # fmt: skip
    return int(case != "rank 0 killed"), at_step(
        5, all_of(partial(Path.touch, place / "trouble"), actions.get(case, KILL))
    )


def all_ended(launchers: Sequence[subprocess.Popen[bytes]], machines: Machines) -> list[int]:
    """The launchers' exit codes, once no process is left on any machine."""
    codes = [launcher.wait(timeout=300) for launcher in launchers]
    while machines.pids():
        time.sleep(0.1)
    return codes


def row(launcher: str, case: str, resumed_with: int, wanted: dict[str, torch.Tensor]) -> str:
    """One line of the table."""
    place = place_for(f"{launcher} {case}")
    with network(3) as machines:
        rank, trouble = trouble_of(case, machines, place)
        launchers = launched(machines, place, launcher, trouble=trouble, of_rank=rank)
        if case == "launcher killed":
            while not (place / "trouble").exists():
                time.sleep(0.1)
            launchers[1].kill()
        codes = all_ended(launchers, machines)
        seconds = time.time() - (place / "trouble").stat().st_mtime
        errors = [re.findall(r"^error: (.*)$", said(place, f"output{number}"), re.MULTILINE) for number in (0, 1)]
        machines.mend(1)
        again = all_ended(launched(machines, place, launcher, count=resumed_with), machines)
    found = load_file(place / "runs/trial/adapter/adapter_model.safetensors")
    difference = max(float((found[name] - tensor).abs().max()) for name, tensor in wanted.items())
    goes_on = re.findall(r"resumes after step \d+", said(place, "output0"))
    return (
        f"| {launcher} | {case} | {codes} {[one[:1] for one in errors]} | {seconds:.0f} | {resumed_with}: {again} "
        f"{goes_on} | {difference:.1e} |"
    )


def main() -> None:
    """Print the table."""
    place = place_for("one machine")
    with network(1) as machines:
        assert all_ended(launched(machines, place, "torchrun", count=1), machines) == [0], said(place, "output0")
    wanted = load_file(place / "runs/trial/adapter/adapter_model.safetensors")
    for number, case in enumerate(CASES):
        print(row("torchrun", case, (1, 2, 3)[number % 3], wanted), flush=True)
    for number, case in enumerate(CASES[:2]):
        print(row("accelerate", case, (3, 2)[number], wanted), flush=True)


if __name__ == "__main__":
    main()
