"""The `lmtune` command in a process of its own that can be killed at a chosen point.

Each process is forked from one that has imported torch and all else, so it starts in milliseconds; it is a real
process for everything that matters here: signals, exit codes, what is on the disk after it died.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.workplace import environment

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["lmtune.cli", "lmtune.training.session", "lmtune.training.lifecycle", "peft", "bitsandbytes", "accelerate",
     "transformers.models.llama.modeling_llama", "tests.processes"]
)  # fmt: skip
Trouble = Callable[[], None]


def lmtune(folder: Path, *arguments: str, trouble: Trouble | None = None) -> int:
    """Run the command in `folder`; its exit code, negative for a signal. What it said is in `folder/output`.

    Args:
        folder: where.
        arguments: of `lmtune`.
        trouble: called in the process before the command, to arrange for its end.
    """
    process = CONTEXT.Process(target=_command, args=(folder, arguments, trouble))
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"lmtune {' '.join(arguments)} did not end")
    assert process.exitcode is not None
    return process.exitcode


def said(folder: Path) -> str:
    """What the last command in `folder` printed."""
    return (folder / "output").read_text()


def _command(folder: Path, arguments: tuple[str, ...], trouble: Trouble | None) -> None:
    os.chdir(folder)
    os.environ.update(environment(folder))
    with open("output", "wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = ["lmtune", *arguments]
    if trouble is not None:
        trouble()
    from lmtune.cli import main

    main()


# --- troubles; each is a partial of a function here, so that it can be sent to the process


def at_step(step: int, number: int) -> Trouble:
    """A signal when the forward pass of `step` begins."""
    return partial(_signal_in, "lmtune.training.loop", "seed_step", number, step, 1)


def after_update(step: int, number: int) -> Trouble:
    """A signal between the update of `step` and its record."""
    return partial(_signal_at_call, "lmtune.training.loop", "_count", number, step)


def in_checkpoint(count: int, part: int, number: int = signal.SIGKILL) -> Trouble:
    """A signal in the middle of checkpoint `count`, before its file `part`: 0 the adapter, 1 the optimizer."""
    return partial(_signal_at_call, "lmtune.training.checkpoint", "save_file", number, 2 * count - 1 + part)


def before_manifest(count: int, number: int = signal.SIGKILL) -> Trouble:
    """A signal when all of checkpoint `count` is written but not yet durable under its name."""
    return partial(_signal_at_call, "lmtune.training.checkpoint", "_make_durable", number, count)


def before(module: str, function: str, number: int = signal.SIGKILL) -> Trouble:
    """A signal at the first call of a function."""
    return partial(_signal_at_call, module, function, number, 1)


def with_environment(**variables: str) -> Trouble:
    """Environment variables of that process alone; what libraries read when they are imported is too late for."""
    return partial(_set_environment, variables)


def _set_environment(variables: dict[str, str]) -> None:
    os.environ.update(variables)


def _signal_at_call(module: str, function: str, number: int, count: int) -> None:
    """Send this process a signal at the call number `count`, before the function does its work."""
    calls = 0

    def counted(real: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    _wrap(module, function, counted)


def _signal_in(module: str, function: str, number: int, value: int, place: int) -> None:
    """Send this process a signal at the call whose argument number `place` is `value`."""

    def watched(real: Any, *args: Any, **kwargs: Any) -> Any:
        if args[place] == value:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    _wrap(module, function, watched)


def _wrap(module: str, function: str, wrapper: Callable[..., Any]) -> None:
    import importlib

    imported = importlib.import_module(module)
    setattr(imported, function, partial(wrapper, getattr(imported, function)))
