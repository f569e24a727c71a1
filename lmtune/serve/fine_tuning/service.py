"""Fine-tuning as a part of a server: routes, a queue that trains, and the models it has made.

tuning = FineTuning(Path("runs/.serve"), Path("runs"), lambda: {"tiny": ModelConfig(name="tiny")}, None, load)
application.include_router(tuning.router)
tuning.start()        # and tuning.close() at the end
tuning.models()       # those of earlier jobs, to load at the start; `load(name, run)` is called for new ones
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fastapi import APIRouter, FastAPI

from lmtune.config.load import load_config
from lmtune.config.schema import FinetuneConfig
from lmtune.errors import ConfigError
from lmtune.io.atomic import try_lock
from lmtune.runs.store import checkpoint_folders, step_of
from lmtune.serve.fine_tuning.events import events_router
from lmtune.serve.fine_tuning.files import files_router
from lmtune.serve.fine_tuning.jobs import Bases, jobs_router
from lmtune.serve.fine_tuning.queue import Queue
from lmtune.serve.fine_tuning.requests import model_name
from lmtune.serve.fine_tuning.settings import read_defaults
from lmtune.serve.fine_tuning.store import Store
from lmtune.serve.openai.errors import add_error_handlers

_CHECKPOINT = re.compile(r"(?P<model>ft:.+):ckpt-step-(?P<step>\d{1,9})")


@dataclass(frozen=True)
class TunedModel:
    """A model that a job has made.

    Attributes:
        name: `ft:…`, which clients use.
        run: the folder of its run.
        base: what the server called its base.
        created: in seconds of the epoch.
    """

    name: str
    run: Path
    base: str
    created: int


class FineTuning:
    """The files and fine-tuning jobs of one server.

    Args:
        folder: for files and the database; `.serve` in the folder of the runs is no run to `lmtune runs list`.
        runs: the folder of the runs, one a job.
        bases: what can be fine-tuned now, by the names that clients use, as it is served.
        defaults: a YAML file of config sections that every job starts from.
        on_model: called in the queue's thread with the name of a new model and its run's folder, before clients see
            that the job has succeeded.
        devices: values of CUDA_VISIBLE_DEVICES, each for one job at a time; None is one job that sees all devices.

    Raises:
        ConfigError: a setting of `defaults` is wrong, or the folder cannot be written.
    """

    def __init__(
        self, folder: Path, runs: Path, bases: Bases, defaults: Path | None = None,
        on_model: Callable[[str, Path], None] = lambda name, run: None, devices: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        tree = read_defaults(defaults)
        try:
            self.store = Store(folder)
        except OSError as error:
            raise ConfigError(f"{folder}: cannot be written ({error.strerror}); permit it or choose another") from None
        self._lock: IO[str] | None = None
        self._queue = Queue(self.store, runs, tree, on_model, devices)
        seed = tree.get("train", {}).get("seed")
        self.router = APIRouter()
        self.router.include_router(files_router(self.store))
        self.router.include_router(jobs_router(self.store, self._queue, bases, seed if isinstance(seed, int) else 0))
        self.router.include_router(events_router(self.store, self._queue))

    def start(self) -> None:
        """Train what is in the queue, and go on with what an earlier server has begun.

        Raises:
            ConfigError: another server works in this folder.
        """
        self._lock = (self.store.path / ".lock").open("a+")
        if try_lock(self._lock) is False:
            self._lock.close()
            raise ConfigError(
                f"{self.store.path}: another server works in this folder; give this one another (--runs), or no jobs "
                "(--no-jobs)"
            )
        self._queue.start()

    def close(self, seconds: float = 60) -> None:
        """Have running jobs save and stop, and wait so long for it; the next start goes on with them."""
        if self._queue.close(seconds):  # else its thread goes on until the process ends
            self.store.close()
        if self._lock is not None:
            self._lock.close()

    def models(self) -> list[TunedModel]:
        """The models of jobs that have succeeded and whose runs are there, the oldest first."""
        found = []
        for job in self.store.jobs_that_are("succeeded"):
            run, name = self._queue.run_of(job), str(job.fine_tuned_model)
            if (
                not self.store.is_deleted(name)
                and run.exists()
                and run.has_result(load_config(FinetuneConfig, run.config).tuning)
            ):
                created = int(job.finished_at or job.created_at)
                found.append(TunedModel(name, run.path, job.base.name, created))
        return found

    def delete_model(self, name: str) -> bool:
        """Have no such model any more, nor its checkpoints; its job and its run stay. False if no job has made it."""
        if self.store.job_of_model(name) is None:
            return False
        self.store.delete_model(name)
        return True

    def checkpoint(self, name: str) -> tuple[Path, int] | None:
        """Run and step of a checkpoint's name, as `/checkpoints` lists it; None if no job has it."""
        found = _CHECKPOINT.fullmatch(name)
        for job in self.store.jobs_that_are("succeeded", "running", "paused", "cancelled", "failed") if found else ():
            if found is not None and model_name(job.base.name, job.request.suffix, job.id) == found["model"]:
                run, step = self._queue.run_of(job), int(found["step"])
                if self.store.is_deleted(found["model"]):
                    return None
                return (run.path, step) if step in map(step_of, checkpoint_folders(run.checkpoints)) else None
        return None


def application_of(tuning: FineTuning) -> FastAPI:
    """An application of these routes alone; it starts and closes the queue."""

    @contextlib.asynccontextmanager
    async def lifespan(application: FastAPI) -> AsyncIterator[None]:
        tuning.start()
        yield
        tuning.close()

    application = FastAPI(lifespan=lifespan)
    add_error_handlers(application)
    application.include_router(tuning.router)
    return application
