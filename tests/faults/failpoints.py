"""A child process that dies at a chosen moment of a checkpoint's writing, without a hook in the code that writes.

Every call that changes the disk is counted while one checkpoint is saved and old ones are deleted; at the chosen one
the process kills itself. A file that is written by one call can also be left half written.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.jobs import job_for
from tests.processes import CONTEXT, ended, wrap

CALLS = [("os", name) for name in ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir")]
WRITES = [("lmtune.training.checkpoint", "save_file"), ("pathlib", "Path.write_text")]


class Failpoints:
    """Counts the stages of the save number `save`, and kills the process at the stage number `stage`."""

    def __init__(self, save: int, stage: int | None) -> None:
        self.save, self.stage = save, stage
        self.saves, self.names, self.armed = 0, [], False  # type: int, list[str], bool
        for module, function in CALLS:
            wrap(module, function, self._before(function))
        for module, function in WRITES:
            wrap(module, function, self._half_way(function))
        wrap("lmtune.training.hooks", "save_checkpoint", self._arm)
        wrap("lmtune.training.hooks", "prune_checkpoints", self._disarm)

    def _arm(self, real: Any, *args: Any) -> Any:
        self.saves += 1
        self.armed = self.saves == self.save
        return real(*args)

    def _disarm(self, real: Any, *args: Any) -> Any:
        real(*args)
        self._come_to("the end")
        self.armed = False

    def _come_to(self, name: str) -> None:
        if self.armed:
            self.names.append(name)
            if len(self.names) == self.stage:
                os.kill(os.getpid(), signal.SIGKILL)

    def _before(self, function: str) -> Callable[..., Any]:
        def wrapper(real: Any, *args: Any, **kwargs: Any) -> Any:
            self._come_to(f"before {function}")
            return real(*args, **kwargs)

        return wrapper

    def _half_way(self, function: str) -> Callable[..., Any]:
        def wrapper(real: Any, *args: Any, **kwargs: Any) -> Any:
            self._come_to(f"before {function}")
            result = real(*args, **kwargs)
            if self.armed and len(self.names) + 1 == self.stage:
                path = next(Path(value) for value in args if isinstance(value, Path))
                os.truncate(path, path.stat().st_size // 2)
            self._come_to(f"half of {function}")
            return result

        return wrapper


def stages_of_a_save(folder: Path, save: int, **settings: Any) -> list[str]:
    """What the save number `save` does, stage by stage."""
    process = CONTEXT.Process(target=_train, args=(folder, save, None, settings))
    process.start()
    assert ended(process) == 0
    return (folder / "stages").read_text().split("\n")


def killed_in_a_save(folder: Path, save: int, stage: int, **settings: Any) -> int:
    """Train in a child that dies at that stage, counted from 1; its exit code."""
    process = CONTEXT.Process(target=_train, args=(folder, save, stage, settings))
    process.start()
    return ended(process)


def _train(folder: Path, save: int, stage: int | None, settings: dict[str, Any]) -> None:
    from tests.jobs import train

    points = Failpoints(save, stage)
    train(job_for(folder, **settings))
    (folder / "stages").write_text("\n".join(points.names))
