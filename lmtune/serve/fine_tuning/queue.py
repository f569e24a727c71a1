"""The queue: a thread that has each job's files checked, trains one job a device, and notes how it ended.

A job's status says what is wanted of it; the thread makes the processes agree with it. So requests only change the
status, and whatever happens to the server in between, the next look at jobs and processes continues there: a process
that outlived the server is found by its lock, and a job that lost its process is started again, which resumes its run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lmtune.config.load import load_config
from lmtune.config.schema import FinetuneConfig
from lmtune.data.checking import inspect_data
from lmtune.errors import LmtuneError
from lmtune.io.atomic import write_text
from lmtune.io.console import err, escape
from lmtune.io.text import one_line
from lmtune.runs.log import last_steps
from lmtune.runs.store import RunDirectory
from lmtune.serve.fine_tuning.files import describe_faults, row_faults
from lmtune.serve.fine_tuning.following import Follower, write_results
from lmtune.serve.fine_tuning.process import JobProcess
from lmtune.serve.fine_tuning.requests import model_name
from lmtune.serve.fine_tuning.settings import ROWS, JobFiles, Tree, as_method, environment_of, settings_of
from lmtune.serve.fine_tuning.store import Job, JobError, Store

Outcome = Literal["complete", "stopped", "killed", "failed"]
_LOOK_SECONDS = 0.3
_START_TRIES = 20
_STOP_CODES = (143, 130, 129, -15, -2, -1)  # of SIGTERM, Ctrl-C and SIGHUP, whether the run could save or not
_UNDER_WAY = ("validating_files", "queued", "running")


@dataclass
class _Worker:
    """A job's process, what is read of its run, and the device it has."""

    process: JobProcess
    follower: Follower
    device: str | None


class Queue:
    """Trains the jobs of a store.

    Args:
        store: of the jobs.
        runs: the folder of their runs.
        defaults: settings that every job starts from.
        on_model: called with the name and the run's folder before a job says that it has succeeded.
        devices: values of CUDA_VISIBLE_DEVICES, for one job each; None is one job that sees all devices.
    """

    def __init__(
        self, store: Store, runs: Path, defaults: Tree, on_model: Callable[[str, Path], None],
        devices: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        self.store, self.runs, self.defaults, self.on_model = store, runs, defaults, on_model
        self._devices: list[str | None] = list(devices) if devices else [None]
        self._workers: dict[str, _Worker] = {}
        self._failed_starts: dict[str, int] = {}
        self._wake, self._closing = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name="fine-tuning", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def wake(self) -> None:
        """Look at the jobs now."""
        self._wake.set()

    def close(self, seconds: float = 60) -> bool:
        """Ask every process to save and stop, and wait so long for it; the next start goes on with the jobs.

        Returns whether all have stopped.
        """
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def run_of(self, job: Job) -> RunDirectory:
        """The run of a job."""
        return RunDirectory(self.runs / job.id)

    def is_prepared(self, job: Job) -> bool:
        """Whether the files of a job were checked, and its settings are written."""
        return self._config_of(job).exists()

    def _work(self) -> None:
        step, said = self._find_processes, ""
        while not self._closing or self._workers:
            try:
                step()
                step, said = self._look, ""
            except Exception as error:  # a full disk, say: the next try may succeed
                if said != (said := one_line(error)):
                    err.print(f"[red]error[/] fine-tuning: {escape(said)}")
            self._wake.wait(_LOOK_SECONDS)
            self._wake.clear()

    def _find_processes(self) -> None:
        """Take over the processes of an earlier server, and put jobs that lost theirs into the queue again."""
        for job in self.store.jobs_that_are("running", "queued", "paused", "cancelled"):
            process = self._process_of(job)
            if process.is_alive():
                self._workers[job.id] = self._worker(job, process, process.device)
            elif job.status == "running":
                worker = self._worker(job, process, None)
                worker.follower.look()
                if self._outcome(job, worker) in ("complete", "failed"):
                    self._settle(job, worker)
                elif self.store.change(job.id, ("running",), status="queued"):
                    self.store.add_event(job.id, "The server has started again: the job resumes from its checkpoint")

    def _look(self) -> None:
        """One round: read what runs tell, end what is not wanted, note what has ended, check files, start."""
        for name, worker in list(self._workers.items()):
            is_alive = worker.process.is_alive()  # asked before reading, so that the last lines are not missed
            worker.follower.look()
            job = self.store.job(name)
            assert job is not None
            if not is_alive:
                self._settle(job, worker)
                del self._workers[name]
            elif self._closing or job.status != "running":
                worker.process.stop()
        if self._closing:
            return
        for job in self.store.jobs_that_are("validating_files"):
            self._prepare(job)
        for job in self.store.jobs_that_are("queued"):
            if len(self._workers) >= len(self._devices):
                break
            if job.id not in self._workers:  # a process that was asked to stop may still save
                self._start(job)

    def _prepare(self, job: Job) -> None:
        """Check the files of a job and write its settings."""
        names = {"training_file": job.request.training_file, "validation_file": job.request.validation_file}
        paths: dict[str, Path] = {}
        for param, name in names.items():
            if name is None:
                continue
            self.store.add_event(job.id, f"Validating {param.replace('_', ' ')}: {name}", key=f"validating-{param}")
            file = self.store.file(name)
            if file is None:
                self._fail(job, JobError(f"invalid_{param}", f"{param}: {name} was deleted; upload it again", param))
                return
            paths[param] = self.store.content_of(file)
            if faults := row_faults(paths[param], file.filename, ROWS[job.request.kind]):
                said = as_method(describe_faults(faults))
                words = f"The job failed due to an invalid {param.replace('_', ' ')}. {said}"
                self._fail(job, JobError(f"invalid_{param}", words, param))
                return
        files = JobFiles(paths["training_file"], paths.get("validation_file"))
        try:
            num_rows = inspect_data([files.train], rows=ROWS[job.request.kind]).train.num_rows
            settings = settings_of(job, files, num_rows, self.runs, self.defaults)
        except LmtuneError as error:
            self._fail(job, JobError("invalid_settings", str(error)))
            return
        except Exception as error:  # of a library that reads the base
            self._fail(job, JobError("invalid_model", f"model: {job.base.name}: {one_line(error)}", "model"))
            return
        write_text(self._config_of(job), settings.yaml)
        if self.store.change(job.id, ("validating_files",), status="queued", hyperparameters=settings.hyperparameters):
            self.store.add_event(job.id, "Files validated, moving job to queued state", key="validated")

    def _start(self, job: Job) -> None:
        steps = last_steps(self.run_of(job), 1)
        after = steps[-1].step if steps else 0
        if not self.store.change(job.id, ("queued",), status="running", begun_after_step=after):
            return
        try:
            worker = self._worker(job, self._process_of(job), self._free_device())
            worker.process.start(self._config_of(job), environment_of(job), worker.device)
        except Exception as error:  # the next look tries again, but others wait behind this one
            self.store.change(job.id, ("running",), status="queued")
            self._failed_starts[job.id] = self._failed_starts.get(job.id, 0) + 1
            if self._failed_starts[job.id] == _START_TRIES:
                self._fail(job, JobError("not_started", f"The process could not be started: {one_line(error)}"))
            raise
        self._workers[job.id] = worker
        self.store.add_event(job.id, "Fine-tuning job started" if not after else "Fine-tuning job started again")

    def _settle(self, job: Job, worker: _Worker) -> None:
        """Note how a process ended, where the job was to run."""
        outcome = self._outcome(job, worker)
        if job.status != "running":
            return
        if outcome == "complete":
            self._succeed(job)
        elif self._closing:
            return
        elif outcome == "failed":
            reason = worker.process.last_words() or self.run_of(job).read_summary().reason
            self._fail(job, JobError("training_failed", reason))
        elif outcome == "stopped":
            if self.store.change(job.id, ("running",), status="paused"):
                self.store.add_event(job.id, "The run was stopped outside of the API; resume the job to go on", "warn")
        elif self._has_gone_on(job) and self.store.change(job.id, ("running",), status="queued"):
            self.store.add_event(job.id, "The process was killed: the job resumes from its checkpoint", "warn")
        else:
            reason = "The process was killed before it finished another step; perhaps the memory was full"
            self._fail(job, JobError("process_killed", f"{reason}. {worker.process.last_words()}".strip()))

    def _outcome(self, job: Job, worker: _Worker) -> Outcome:
        """How a process ended: by its exit code, or by what its run says where an earlier server started it."""
        code = worker.process.exit_code
        if code is not None:
            by_code: Outcome = "stopped" if code in _STOP_CODES else "killed" if code < 0 else "failed"
            return "complete" if code == 0 else by_code
        run = self.run_of(job)
        if not run.summary.is_file() or run.summary.stat().st_mtime < worker.process.started_at:
            return "killed"  # before it wrote anything
        ended: dict[str, Outcome] = {"complete": "complete", "failed": "failed", "interrupted": "stopped"}
        return ended.get(run.read_summary().status, "killed")

    def _has_gone_on(self, job: Job) -> bool:
        steps = last_steps(self.run_of(job), 1)
        return bool(steps) and steps[-1].step > (job.begun_after_step or 0)

    def _succeed(self, job: Job) -> None:
        """Keep the results, hand the model over, and only then say so."""
        run = self.run_of(job)
        staged = self.store.files_folder / f".{job.id}.csv"
        write_results(run, staged)
        results = self.store.add_file(
            staged, f"{job.id}-results.csv", "fine-tune-results", job.id.replace("ftjob-", "file-")
        )
        name = model_name(job.base.name, job.request.suffix, job.id)
        try:
            self.on_model(name, run.path)
        except Exception as error:  # what it has trained is there all the same
            self.store.add_event(
                job.id, f"The new model could not be loaded: {one_line(error)}", "warn", key="unloaded"
            )
        figures = run.read_summary().figures
        with self.store.together():
            done = self.store.change(
                job.id, ("running",), status="succeeded", fine_tuned_model=name, result_file=results.id,
                finished_at=time.time(), trained_tokens=int(figures.get("tokens", 0)),
            )  # fmt: skip
            if done:
                self.store.add_event(job.id, f"New fine-tuned model created: {name}", key="model")
                self.store.add_event(job.id, "The job has successfully completed", key="completed")

    def _fail(self, job: Job, error: JobError) -> None:
        if self.store.change(job.id, _UNDER_WAY, status="failed", error=error, finished_at=time.time()):
            self.store.add_event(job.id, error.message, "error")

    def _config_of(self, job: Job) -> Path:
        return self.store.jobs_folder / f"{job.id}.yaml"

    def _process_of(self, job: Job) -> JobProcess:
        return JobProcess(self.store.jobs_folder, job.id, self.run_of(job))

    def _worker(self, job: Job, process: JobProcess, device: str | None) -> _Worker:
        train = load_config(FinetuneConfig, self._config_of(job)).train
        return _Worker(process, Follower(self.store, job.id, self.run_of(job), train), device)

    def _free_device(self) -> str | None:
        taken = {worker.device for worker in self._workers.values()}
        return next((device for device in self._devices if device not in taken), None)
