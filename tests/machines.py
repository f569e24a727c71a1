"""Machines in a network of their own, each a network namespace with a host name, that a test can cut off.

with network(2) as machines:
    processes = machines.start(folder, "finetune", "run.yaml")

Needs root and `ip`. Where they are missing the tests are skipped, and fail with LMTUNE_REQUIRE_NETWORK=1, as CI has it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.processes import KILL, Trouble, all_of, at_step, start
from tests.workplace import environment

PORT = "29500"
_NEWNET, _NEWNS, _NEWUTS = 0x40000000, 0x00020000, 0x04000000  # of setns(2) and unshare(2)
_FILES = Path("/etc/netns")  # what `ip netns exec` puts in the place of files in /etc


@dataclass(frozen=True)
class Machines:
    """Machines at one switch. The first is `machine0` at 10.77.0.1; each has the interface `eth0`."""

    names: Sequence[str]  # of the namespaces
    test_pid: int  # in whose namespace the switch is

    def start(
        self, folder: Path, *arguments: str, troubles: Mapping[int, Trouble] | None = None, count: int | None = None,
        folders: Sequence[Path] = (),
    ) -> list[Any]:  # fmt: skip
        """One process of a job on each machine, or on the first `count`; what each says is in `outputN`.

        They share `folder`, or have one of `folders` each. Each machine has a cache of its own.
        """
        size = len(self.names) if count is None else count
        shared = {
            "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "machine0",
            "MASTER_PORT": PORT, "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "eth0",
        }  # fmt: skip
        return [
            start(
                folders[rank] if folders else folder, *arguments, output=f"output{rank}",
                trouble=all_of(self.entering(rank), *([troubles[rank]] if rank in (troubles or {}) else [])),
                variables={**shared, "RANK": str(rank), "LMTUNE_CACHE": str(folder / f"cache{rank}")},
            )
            for rank in range(size)
        ]  # fmt: skip

    def entering(self, number: int) -> Trouble:
        """Makes a process one of this machine."""
        return partial(_enter, self.names[number], f"machine{number}")

    def cutting(self, number: int) -> Trouble:
        """Pulls the cable of a machine."""
        return partial(_switch_port, self.test_pid, self.names[number], "down")

    def mend(self, number: int) -> None:
        """Put the cable back."""
        _switch_port(self.test_pid, self.names[number], "up")

    def command(self, number: int, *words: str) -> list[str]:
        """A command to run on a machine, whose process id is that of the command."""
        name = f'hostname machine{number} && exec "$@"'
        return ["ip", "netns", "exec", self.names[number], "unshare", "--uts", "sh", "-c", name, "sh", *words]

    def pids(self) -> list[int]:
        """The processes that are on these machines."""
        found = (_run("ip", "netns", "pids", name).split() for name in self.names)
        return [int(pid) for pids in found for pid in pids]


@contextlib.contextmanager
def network(count: int) -> Iterator[Machines]:
    """So many machines; what still runs on them at the end is killed. Skips the test where there can be none."""
    _require_namespaces()
    names = [f"lmt{os.getpid()}-{number}" for number in range(count)]
    switch = f"lmt{os.getpid()}"
    hosts = "127.0.0.1 localhost\n" + "".join(f"10.77.0.{number + 1} machine{number}\n" for number in range(count))
    with contextlib.ExitStack() as made:
        _run("ip", "link", "add", switch, "type", "bridge")
        made.callback(_run, "ip", "link", "delete", switch)
        _run("ip", "link", "set", switch, "up")
        for number, name in enumerate(names):
            _run("ip", "netns", "add", name)
            made.callback(_remove, name)
            (_FILES / name).mkdir(parents=True)
            (_FILES / name / "hosts").write_text(hosts)
            (_FILES / name / "resolv.conf").write_text("")  # nobody else is known
            _run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            _run("ip", "link", "set", name, "master", switch, "up")
            inside = ("ip", "-n", name)
            _run(*inside, "address", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                _run(*inside, "link", "set", interface, "up")
        yield Machines(names, os.getpid())


def _require_namespaces() -> None:
    missing = "" if os.geteuid() == 0 else "needs root, to make network namespaces"
    if not missing and shutil.which("ip") is None:
        missing = "needs the command ip; install it, for example with `apt-get install iproute2`"
    if not missing:
        probe = f"lmt{os.getpid()}-probe"
        tried = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
        missing = f"no network namespace can be made: {tried.stderr.strip()}" if tried.returncode else ""
        subprocess.run(["ip", "netns", "delete", probe], capture_output=True, check=False)
    if missing and os.environ.get("LMTUNE_REQUIRE_NETWORK") == "1":
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)


def _remove(name: str) -> None:
    for pid in _run("ip", "netns", "pids", name).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), 9)
    _run("ip", "netns", "delete", name)  # and with it its end of the cable, once no process is in it
    shutil.rmtree(_FILES / name, ignore_errors=True)


def _enter(name: str, host: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{name}") as namespace:
        if libc.setns(namespace.fileno(), _NEWNET) or libc.unshare(_NEWUTS | _NEWNS):
            raise OSError(ctypes.get_errno(), "cannot enter the namespace")
    socket.sethostname(host)
    _run("mount", "--make-rprivate", "/")
    for file in (_FILES / name).iterdir():
        _run("mount", "--bind", str(file), f"/etc/{file.name}")


def _switch_port(pid: int, name: str, state: str) -> None:
    _run("nsenter", f"--net=/proc/{pid}/ns/net", "ip", "link", "set", name, state)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# --- launchers on the machines

RECIPE = str(Path(__file__).parent / "faults" / "recipe.py")
LAUNCHERS = {
    "accelerate": "accelerate launch --multi_gpu --num_machines {count} --num_processes {count} --machine_rank {rank} "
    "--main_process_ip machine0 --main_process_port 29500 --mixed_precision no --dynamo_backend no",
    "torchrun": "torchrun --nnodes {count} --nproc_per_node 1 --node_rank {rank} --master_addr machine0 "
    "--master_port 29500",
}


def launched(
    machines: Machines, place: Path, launcher: str, *settings: str, trouble: Trouble | None = None, of_rank: int = 1,
    count: int = 2,
) -> list[subprocess.Popen[bytes]]:  # fmt: skip
    """A launcher on each of `count` machines, which starts `run.yaml` there with trouble for one rank."""
    variables = {
        "TROUBLE": pickle.dumps(trouble or at_step(-1, KILL)).hex(), "RANK_IN_TROUBLE": str(of_rank),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
        "GLOO_SOCKET_IFNAME": "eth0", "ACCELERATE_USE_CPU": "true", "TORCH_CPP_LOG_LEVEL": "ERROR",
    }  # fmt: skip
    running = []
    for rank in range(count):
        words = LAUNCHERS[launcher].format(rank=rank, count=count).split()
        with open(place / f"output{rank}", "wb") as output:
            running.append(
                subprocess.Popen(
                    machines.command(rank, *words, RECIPE, "run.yaml", *settings), cwd=place, stdout=output,
                    env=environment(place, **variables), stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
    return running
