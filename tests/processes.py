"""The `lmtune` command in a process of its own that can be killed at a chosen point.

Each process is forked from one that has imported torch and all else, so it starts in milliseconds; it is a real
process for everything that matters here: signals, exit codes, what is on the disk after it died.
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.workplace import environment

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["lmtune.cli", "lmtune.training.compose", "lmtune.training.lifecycle", "peft", "bitsandbytes", "accelerate",
     "transformers.models.llama.modeling_llama", "tests.processes"]
)  # fmt: skip
Trouble = Callable[[], object]


def lmtune(folder: Path, *arguments: str, trouble: Trouble | None = None) -> int:
    """Run the command in `folder`; its exit code, negative for a signal. What it said is in `folder/output`.

    Args:
        folder: where.
        arguments: of `lmtune`.
        trouble: called in the process before the command, to arrange for its end.
    """
    return ended(start(folder, *arguments, trouble=trouble))


def completed(
    folder: Path, *arguments: str, given: str = "", variables: Mapping[str, str | None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command in `folder`, as `subprocess.run` does.

    Args:
        folder: where.
        arguments: of `lmtune`.
        given: on its stdin.
        variables: of the environment, beside the caller's own; None takes one away. What libraries read when they are
            imported is too late.
    """
    with tempfile.TemporaryDirectory() as name:
        streams = [Path(name) / stream for stream in ("stdin", "stdout", "stderr")]
        streams[0].write_text(given, encoding="utf-8")
        changed = {**os.environ, **(variables or {})}
        process = CONTEXT.Process(target=_as_if_run, args=(folder, arguments, streams, changed))
        process.start()
        code = ended(process, within_seconds=250)
        said = [path.read_text(encoding="utf-8") if path.exists() else "" for path in streams[1:]]
    return subprocess.CompletedProcess(["lmtune", *arguments], code, *said)


def together(
    folder: Path, *arguments: str, troubles: Mapping[int, Trouble] | None = None, processes: int = 2
) -> list[int]:
    """Run the command as processes of one job; their exit codes. What they said is in `output0`, `output1`, ….

    They meet as under `accelerate launch`, but nobody ends the one when the other has failed.
    """
    return [ended(process) for process in started_together(folder, *arguments, troubles=troubles, processes=processes)]


def started_together(
    folder: Path, *arguments: str, troubles: Mapping[int, Trouble] | None = None, processes: int = 2
) -> list[Any]:
    """The processes of `together`, which are under way."""
    count = str(processes)
    shared = {
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    shared["ACCELERATE_USE_CPU"] = "true"
    return [
        start(
            folder, *arguments, trouble=(troubles or {}).get(rank), output=f"output{rank}",
            variables={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]  # fmt: skip


def start(
    folder: Path, *arguments: str, trouble: Trouble | None = None, output: str = "output",
    variables: Mapping[str, str] | None = None,
) -> Any:  # fmt: skip
    """Start the command in `folder`, with more environment variables."""
    process = CONTEXT.Process(target=_command, args=(folder, arguments, trouble, output, dict(variables or {})))
    process.start()
    return process


def ended(process: Any, within_seconds: float = 120) -> int:
    """Wait for a process; its exit code."""
    process.join(within_seconds)
    if process.is_alive():
        process.kill()
        raise AssertionError("a process did not end")
    assert process.exitcode is not None
    return int(process.exitcode)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def said(folder: Path, output: str = "output") -> str:
    """What the last command in `folder` printed."""
    return (folder / output).read_text()


def _as_if_run(
    folder: Path, arguments: tuple[str, ...], streams: Sequence[Path], variables: Mapping[str, str | None]
) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update({name: value for name, value in variables.items() if value is not None})
    for descriptor, path in enumerate(streams):
        with open(path, "wb" if descriptor else "rb") as file:
            os.dup2(file.fileno(), descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - multiprocessing has closed it
    _main(arguments)


def _command(
    folder: Path, arguments: tuple[str, ...], trouble: Trouble | None, output: str, variables: dict[str, str]
) -> None:
    os.chdir(folder)
    os.environ.update(environment(folder, **variables))
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if trouble is not None:
        trouble()
    _main(arguments)


def _main(arguments: Sequence[str]) -> None:
    sys.argv = ["lmtune", *arguments]
    from lmtune.cli import main

    atexit._clear()  # a child of the fork server has its parent's, and does not run them by itself
    try:
        main()
    finally:
        atexit._run_exitfuncs()


# --- troubles; each is a partial of a function here, so that it can be sent to the process


def at_step(step: int, action: Trouble) -> Trouble:
    """`action` when the forward pass of `step` begins."""
    return partial(_act_at_value, "lmtune.training.loop", "seed_step", action, step, 1)


def after_update(step: int, action: Trouble) -> Trouble:
    """`action` between the update of `step` and its record."""
    return at_call("lmtune.training.loop", "_advance", action, step)


def in_checkpoint(count: int, part: int, action: Trouble) -> Trouble:
    """`action` in the middle of checkpoint `count`, before its file `part`: 0 the adapter, 1 the optimizer."""
    return at_call("lmtune.training.checkpoint", "save_file", action, 2 * count - 1 + part)


def at_call(module: str, function: str, action: Trouble, count: int = 1) -> Trouble:
    """`action` at the call number `count` of a function, before it does its work."""
    return partial(_act_at_call, module, function, action, count)


def with_environment(**variables: str) -> Trouble:
    """Environment variables of that process alone; what libraries read when they are imported is too late for."""
    return partial(_set_environment, variables)


def _set_environment(variables: dict[str, str]) -> None:
    os.environ.update(variables)


def send(number: int) -> Trouble:
    """A signal to the process itself."""
    return partial(_send, number)


def all_of(*troubles: Trouble) -> Trouble:
    """One trouble after the other."""
    return partial(_all_of, troubles)


def _send(number: int) -> None:
    os.kill(os.getpid(), number)


KILL = send(signal.SIGKILL)


def _all_of(troubles: tuple[Trouble, ...]) -> None:
    for trouble in troubles:
        trouble()


def _act_at_call(module: str, function: str, action: Trouble, count: int) -> None:
    calls = 0

    def counted(real: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            action()
        return real(*args, **kwargs)

    wrap(module, function, counted)


def _act_at_value(module: str, function: str, action: Trouble, value: int, place: int) -> None:
    """`action` at the call whose argument number `place` is `value`."""

    def watched(real: Any, *args: Any, **kwargs: Any) -> Any:
        if args[place] == value:
            action()
        return real(*args, **kwargs)

    wrap(module, function, watched)


def wrap(module: str, function: str, wrapper: Callable[..., Any]) -> None:
    """Replace `module.function`, or `module.Class.method`, by `wrapper(real, *arguments)`."""
    *owners, name = function.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    real = getattr(owner, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        return wrapper(real, *args, **kwargs)

    setattr(owner, name, replaced)
