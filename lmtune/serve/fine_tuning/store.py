"""Files, jobs and events on disk: SQLite in `DIR/lmtune.db`, the content of files in `DIR/files`.

    store = Store(Path("runs/.serve"))
    file = store.add_file(staged, "rows.jsonl", "fine-tune")
    job = store.add_job(request, base)
    store.change(job.id, ("queued", "running"), status="paused")     # False where it has another status by now

What is written is on the disk when a function returns, also if the machine loses power then. One process writes; the
threads of it may share a store.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sqlite3
import string
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lmtune.config.schema import ModelConfig
from lmtune.io.atomic import sync_folder
from lmtune.serve.fine_tuning.requests import JobRequest

JobStatus = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
Level = Literal["info", "warn", "error"]
Order = Literal["asc", "desc"]
_TABLES = """
create table if not exists files (
    number integer primary key autoincrement, id text unique not null, bytes integer not null, created_at real not null,
    filename text not null, purpose text not null
);
create table if not exists jobs (
    number integer primary key autoincrement, id text unique not null, created_at real not null, request text not null,
    base text not null, status text not null, hyperparameters text not null, error text, finished_at real,
    trained_tokens integer, result_file text, fine_tuned_model text unique, begun_after_step integer
);
create table if not exists events (
    number integer primary key autoincrement, id text unique not null, job text not null, created_at real not null,
    level text not null, message text not null, data text
);
create table if not exists deleted_models (name text primary key not null);
create index if not exists events_of_job on events (job, number);
"""
_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class StoredFile:
    """A file that was uploaded, or that a job has made."""

    number: int
    id: str
    bytes: int
    created_at: float
    filename: str
    purpose: str


@dataclass(frozen=True)
class Base:
    """What a job trains.

    Attributes:
        name: what the server calls the base.
        model: the base as it is served.
        start: the job whose adapter it begins from.
    """

    name: str
    model: ModelConfig
    start: str | None = None


@dataclass(frozen=True)
class JobError:
    """Why a job failed; `param` is the field of its request that it is about."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True)
class Job:
    """A fine-tuning job.

    Attributes:
        number: in the order of creation.
        hyperparameters: as they were resolved; `auto` until then.
        fine_tuned_model: the name of its model, once there is one.
        begun_after_step: the last step that was recorded when its process was started.
    """

    number: int
    id: str
    created_at: float
    request: JobRequest
    base: Base
    status: JobStatus
    hyperparameters: Mapping[str, object]
    error: JobError | None
    finished_at: float | None
    trained_tokens: int | None
    result_file: str | None
    fine_tuned_model: str | None
    begun_after_step: int | None


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job; `data` holds figures of a step."""

    number: int
    id: str
    job: str
    created_at: float
    level: Level
    message: str
    data: Mapping[str, object] | None


class Store:
    """The database and the files of one server, in the folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path, self.files_folder, self.jobs_folder = path, path / "files", path / "jobs"
        for folder in (self.files_folder, self.jobs_folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._base = sqlite3.connect(path / "lmtune.db", check_same_thread=False, isolation_level=None)
        self._base.row_factory = sqlite3.Row
        self._base.execute("pragma journal_mode = wal")
        self._base.execute("pragma synchronous = full")
        self._base.executescript(_TABLES)

    def close(self) -> None:
        """Let the database go."""
        with self._lock:
            self._base.close()

    # --- files

    def content_of(self, file: StoredFile) -> Path:
        """Where the content of a file is."""
        return self.files_folder / f"{file.id}{'.csv' if file.purpose == 'fine-tune-results' else '.jsonl'}"

    def add_file(self, staged: Path, filename: str, purpose: str, name: str | None = None) -> StoredFile:
        """Take over the file `staged`, which is on the same disk; `name` is its id, by default a new one."""
        with staged.open("rb") as written:
            os.fsync(written.fileno())
        file = StoredFile(0, name or new_id("file-"), staged.stat().st_size, time.time(), filename, purpose)
        staged.replace(self.content_of(file))
        sync_folder(self.files_folder)
        with self._lock:
            self._base.execute(
                "insert or replace into files (id, bytes, created_at, filename, purpose) values (?, ?, ?, ?, ?)",
                (file.id, file.bytes, file.created_at, filename, purpose),
            )
        return file

    def file(self, name: str) -> StoredFile | None:
        """The file of an id."""
        found = self._one("select * from files where id = ?", name)
        return None if found is None else StoredFile(**found)

    def files(
        self, after: StoredFile | None, limit: int, order: Order, purpose: str | None
    ) -> tuple[list[StoredFile], bool]:
        """Up to `limit` files behind `after`, and whether there are more."""
        where, values = ("where purpose = ?", [purpose]) if purpose is not None else ("where true", [])
        rows, more = self._page("files", where, values, None if after is None else after.number, limit, order)
        return [StoredFile(**row) for row in rows], more

    def delete_file(self, file: StoredFile) -> None:
        """Forget a file, and remove its content."""
        with self._lock:
            self._base.execute("delete from files where id = ?", (file.id,))
        self.content_of(file).unlink(missing_ok=True)

    def users_of(self, file: StoredFile) -> list[str]:
        """The jobs that have not ended and need a file."""
        return [
            row["id"]
            for row in self._all(
                "select id from jobs where status in ('validating_files', 'queued', 'running', 'paused') and "
                "? in (json_extract(request, '$.training_file'), json_extract(request, '$.validation_file'))",
                file.id,
            )
        ]

    # --- jobs

    def add_job(self, request: JobRequest, base: Base) -> Job:
        """A new job, whose files are still to be checked."""
        name = new_id("ftjob-")
        asked = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
        asked |= {"beta": "auto"} if request.kind == "dpo" else {}
        asked |= {key: value for key, value in request.asked if value is not None}
        with self._lock:
            self._base.execute(
                "insert into jobs (id, created_at, request, base, status, hyperparameters) values (?, ?, ?, ?, ?, ?)",
                (name, time.time(), request.model_dump_json(), json.dumps(asdict(base)), "validating_files",
                 json.dumps(asked)),
            )  # fmt: skip
        job = self.job(name)
        assert job is not None
        return job

    def job(self, name: str) -> Job | None:
        """The job of an id."""
        found = self._one("select * from jobs where id = ?", name)
        return None if found is None else _job(found)

    def job_of_model(self, model: str) -> Job | None:
        """The job that made the model of this name."""
        found = self._one("select * from jobs where fine_tuned_model = ? and status = 'succeeded'", model)
        return None if found is None else _job(found)

    def delete_model(self, model: str) -> None:
        """Have no such model any more; its job and its run stay."""
        with self._lock:
            self._base.execute("insert or ignore into deleted_models values (?)", (model,))

    def is_deleted(self, model: str) -> bool:
        """Whether a model was deleted."""
        return self._one("select name from deleted_models where name = ?", model) is not None

    def jobs(
        self, after: Job | None, limit: int, metadata: Mapping[str, str] | None = None, only_without: bool = False
    ) -> tuple[list[Job], bool]:
        """Up to `limit` jobs that are older than `after`, the newest first, and whether there are more.

        `metadata`: pairs that they must have; `only_without`: jobs without any.
        """
        where = "where json_extract(request, '$.metadata') is null" if only_without else "where true"
        values: list[object] = []
        for key, value in (metadata or {}).items():
            where += " and exists (select 1 from json_each(request, '$.metadata') as pair where pair.key = ?"
            where += " and pair.value = ?)"
            values += [key, value]
        rows, more = self._page("jobs", where, values, None if after is None else after.number, limit, "desc")
        return [_job(row) for row in rows], more

    def jobs_that_are(self, *statuses: JobStatus) -> list[Job]:
        """The jobs of these statuses, the oldest first."""
        marks = ", ".join("?" * len(statuses))
        return [
            _job(row) for row in self._all(f"select * from jobs where status in ({marks}) order by number", *statuses)
        ]

    def change(self, name: str, only_from: Collection[str], **values: object) -> bool:
        """Set columns of a job, if it has one of these statuses; whether it had.

        Values are text, numbers or None; an error, and hyperparameters, are written as JSON.
        """
        written = {
            key: json.dumps(asdict(value) if isinstance(value, JobError) else value)
            if isinstance(value, (JobError, Mapping))
            else value
            for key, value in values.items()
        }
        columns, marks = ", ".join(f"{key} = ?" for key in written), ", ".join("?" * len(only_from))
        with self._lock:
            done = self._base.execute(
                f"update jobs set {columns} where id = ? and status in ({marks})",
                (*written.values(), name, *only_from),
            )
            return done.rowcount == 1

    # --- events

    def add_event(
        self, job: str, message: str, level: Level = "info", data: Mapping[str, object] | None = None,
        key: str | None = None, at: float | None = None,
    ) -> None:  # fmt: skip
        """Note that something happened.

        Args:
            job: to which one.
            message: in words.
            level: how serious it is.
            data: figures.
            key: one that is told twice with the same key is one event; the second time, its words and data change.
            at: when, in seconds of the epoch; now, if not given.
        """
        text = None if data is None else json.dumps(data)
        with self._lock:
            self._base.execute(
                "insert into events (id, job, created_at, level, message, data) values (?, ?, ?, ?, ?, ?) "
                "on conflict (id) do update set message = excluded.message, data = excluded.data",
                (event_id(job, key), job, at or time.time(), level, message, text),
            )

    def event(self, name: str) -> JobEvent | None:
        """The event of an id."""
        found = self._one("select * from events where id = ?", name)
        return None if found is None else _event(found)

    def events(
        self, job: str, after: JobEvent | None, limit: int, order: Order = "desc"
    ) -> tuple[list[JobEvent], bool]:
        """Up to `limit` events of a job behind `after` in this order, and whether there are more."""
        rows, more = self._page("events", "where job = ?", [job], None if after is None else after.number, limit, order)
        return [_event(row) for row in rows], more

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is written inside the block is on the disk together, or not at all."""
        with self._lock:
            self._base.execute("begin immediate")
            try:
                yield
            except BaseException:
                self._base.execute("rollback")
                raise
            self._base.execute("commit")

    def _page(
        self, table: str, where: str, values: Sequence[object], after: int | None, limit: int, order: Order
    ) -> tuple[list[dict[str, Any]], bool]:
        if after is not None:
            where, values = f"{where} and number {'>' if order == 'asc' else '<'} ?", [*values, after]
        rows = self._all(f"select * from {table} {where} order by number {order} limit ?", *values, limit + 1)
        return rows[:limit], len(rows) > limit

    def _one(self, question: str, *values: object) -> dict[str, Any] | None:
        return next(iter(self._all(question, *values)), None)

    def _all(self, question: str, *values: object) -> list[dict[str, Any]]:
        with self._lock:
            return [dict(row) for row in self._base.execute(question, values).fetchall()]


def new_id(prefix: str) -> str:
    """An id that nobody can guess."""
    return prefix + "".join(secrets.choice(_LETTERS) for _ in range(24))


def event_id(job: str, key: str | None) -> str:
    """The id of the event that `key` names, always the same; a new one without a key."""
    return new_id("ftevent-") if key is None else f"ftevent-{job.removeprefix('ftjob-')}-{key}"


def _job(row: Mapping[str, Any]) -> Job:
    base, error = json.loads(row["base"]), row["error"]
    read = {
        "request": JobRequest.model_validate_json(row["request"]),
        "base": Base(base["name"], ModelConfig(**base["model"]), base["start"]),
        "hyperparameters": json.loads(row["hyperparameters"]),
        "error": None if error is None else JobError(**json.loads(error)),
    }
    return Job(**{**row, **read})


def _event(row: Mapping[str, Any]) -> JobEvent:
    return JobEvent(**{**row, "data": None if row["data"] is None else json.loads(row["data"])})
