"""Starting a recipe in several processes through `accelerate launch`, and handing on signals and exit codes."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmtune.config.schema import FsdpConfig, ParallelConfig, ReplicatedConfig
from lmtune.errors import ConfigError
from lmtune.io.atomic import wait_for_lock
from lmtune.io.console import err
from lmtune.models.libraries import quiet_libraries
from lmtune.parallel.signals import stop_signals
from lmtune.parallel.worker import EXIT_CODES, NUM_PROCESSES, PARENT_PID, check_world, exit_with_parent, hold_exit_codes

if TYPE_CHECKING:
    from lmtune.parallel.base import Parallel

_PLAIN_JOB = {
    "compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "machine_rank": 0, "num_machines": 1,
    "mixed_precision": "no", "use_cpu": False, "debug": False,
}  # fmt: skip


def connect(section: ParallelConfig, process_timeout_seconds: float) -> Parallel:
    """This process among those of the run, which have found each other when it returns.

    `process_timeout_seconds`: how long a rank may show no sign of life while the others wait for it.
    """
    check_world()
    quiet_libraries()
    running = int(os.environ.get("WORLD_SIZE", "1"))
    hold_exit_codes()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a launcher started this process, and not a shell that may leave
        exit_with_parent()
    if running == 1:
        from lmtune.parallel.single import Single

        return Single()
    from lmtune.parallel.replicated import Replicated
    from lmtune.parallel.sharded import Sharded

    kinds: dict[type, type[Replicated]] = {ReplicatedConfig: Replicated, FsdpConfig: Sharded}
    parallel = kinds[type(section)](process_timeout_seconds)
    atexit.register(parallel.close)  # or the launcher would report a run that ended well as failed
    if parallel.world_size != running:
        raise ConfigError(f"--processes: {running} were started, but Accelerate sees {parallel.world_size}")
    return parallel


def launch(recipe: Path, arguments: Sequence[str], processes: int) -> int:
    """Run a recipe in `processes` processes through `accelerate launch`, without enough GPUs on the CPU.

    Returns the exit code.
    """
    with tempfile.TemporaryDirectory() as folder:
        codes, settings = Path(folder) / "codes", Path(folder) / "accelerate.json"
        settings.write_text(json.dumps(_PLAIN_JOB), encoding="utf-8")  # in place of what `accelerate config` wrote
        command = [
            sys.executable, "-m", "lmtune.parallel.launcher", "--config_file", str(settings), "--multi_gpu",
            "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no",
            "--dynamo_backend", "no", "--main_process_port", str(_free_port()), str(recipe), *arguments,
        ]  # fmt: skip
        environment = {**os.environ, **_environment(processes), NUM_PROCESSES: str(processes), EXIT_CODES: str(codes)}
        environment[PARENT_PID] = str(os.getpid())
        launcher = subprocess.Popen(command, env=environment, start_new_session=True)  # a terminal's Ctrl-C comes here
        received = _forward_signals(launcher)
        launcher.wait()
        if launcher.returncode < 0 and not received:
            name = signal.Signals(-launcher.returncode).name
            hint = "; perhaps the memory was full" if name == "SIGKILL" else ""
            err.print(f"[bold red]error:[/] the launcher was ended by {name}{hint}")
            err.print("  its processes end after their step")
        _wait_for_workers(codes)
        noted = [int(code) for code in codes.read_text().split()]
        if launcher.returncode and (received or launcher.returncode < 0):
            return _stopped(noted, processes, received)
        if launcher.returncode == 0 and len(noted) < processes:
            err.print(f"[bold red]error:[/] {processes - len(noted)} of {processes} processes ended before their work")
        return _failure(noted, processes) if launcher.returncode or len(noted) < processes else 0


def _wait_for_workers(codes: Path) -> None:
    """Until the last process has ended, also where the launcher was killed and did not wait for them."""
    with codes.open("a") as file:
        wait_for_lock(file)


def _stopped(noted: Sequence[int], processes: int, received: Sequence[int]) -> int:
    """The exit code where the command was asked to stop, or the launcher was killed: 0 if the run ended well yet."""
    if list(noted) == [0] * processes:
        return 0
    return 128 + received[0] if received else 1


def _failure(noted: Sequence[int], processes: int) -> int:
    """The exit code of the process that failed first by itself; the launcher then ends the others with SIGTERM."""
    stopped = 128 + signal.SIGTERM
    failed = [code for code in noted if code not in (0, stopped)]
    if failed:
        return failed[0]
    return stopped if list(noted) == [stopped] * processes else 1


def _environment(processes: int) -> dict[str, str]:
    """Cores shared out; the CPU chosen where the GPUs are too few."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    extra = {} if gpus >= processes else {"ACCELERATE_USE_CPU": "true"}
    threads = max(1, (os.cpu_count() or 1) // processes)
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)), **extra}


def _forward_signals(launcher: subprocess.Popen[bytes]) -> list[int]:
    """Hand SIGTERM, SIGHUP and Ctrl-C on to the launcher, which hands them to its workers; returns what was received.

    All are handed on as SIGTERM, once: the workers finish and save their step. A second SIGTERM changes nothing, a
    second Ctrl-C ends them in the middle of it.
    """
    received: list[int] = []

    def forward(number: int, frame: Any) -> None:
        if not received:
            launcher.send_signal(signal.SIGTERM)
        elif number == signal.SIGINT:
            received[0] = number
            _kill(launcher)
        received.append(number)

    for number in stop_signals():
        signal.signal(number, forward)
    return received


def _kill(launcher: subprocess.Popen[bytes]) -> None:
    """End the launcher and its workers at once; KeyboardInterrupt if it has ended, and its workers are not known."""
    import psutil

    try:
        workers = psutil.Process(launcher.pid).children(recursive=True)
    except psutil.Error:
        raise KeyboardInterrupt from None
    launcher.kill()
    for worker in workers:
        with contextlib.suppress(psutil.Error):
            worker.kill()
    err.print("stopped")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
