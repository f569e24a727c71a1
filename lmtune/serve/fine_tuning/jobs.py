"""`/v1/fine_tuning/jobs`: a job is created, listed, paused, resumed and cancelled."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.requests import Request

from lmtune.config.schema import ModelConfig
from lmtune.errors import ConfigError
from lmtune.serve.fine_tuning.objects import Object, job_object, list_object
from lmtune.serve.fine_tuning.queue import Queue
from lmtune.serve.fine_tuning.requests import JobRequest
from lmtune.serve.fine_tuning.store import Base, Job, JobStatus, Store
from lmtune.serve.openai.errors import ApiError

Bases = Callable[[], Mapping[str, ModelConfig]]
_RECENT = 20  # steps, by which the rest of a run is estimated
PREFIX = "/v1/fine_tuning/jobs"
Limit = Annotated[int, Query(ge=1, le=100)]


def jobs_router(store: Store, queue: Queue, bases: Bases, seed: int) -> APIRouter:
    """The routes below `/v1/fine_tuning/jobs`.

    Args:
        store: of files and jobs.
        queue: that trains them.
        bases: what can be trained, by the names that clients use.
        seed: of jobs that name none.
    """
    router = APIRouter(tags=["fine-tuning"])

    @router.post(PREFIX)
    def create(request: JobRequest) -> Object:
        base = _base_of(store, bases(), request.model)
        for param in ("training_file", "validation_file"):
            _check_file(store, param, getattr(request, param))
        _check_trackers(request)
        if request.validation_file == request.training_file:
            raise ApiError(400, "validation_file: is the training file; expected other rows", param="validation_file")
        chosen = request if request.seed is not None else request.model_copy(update={"seed": seed})
        with store.together():  # so that the queue does not tell of it first
            job = store.add_job(chosen, base)
            store.add_event(job.id, f"Created fine-tuning job: {job.id}", key="created")
        queue.wake()
        return job_object(job)

    @router.get(PREFIX)
    def list_jobs(request: Request, after: str | None = None, limit: Limit = 20) -> Object:
        cursor = None if after is None else store.job(after)
        if after is not None and cursor is None:
            raise ApiError(400, f"after: {after}: no such job; expected the id of one in the list", param="after")
        pairs = (
            (re.fullmatch(r"metadata\[(.*)\]", key, re.DOTALL), value) for key, value in request.query_params.items()
        )
        metadata = {found[1]: value for found, value in pairs if found}
        found, more = store.jobs(cursor, limit, metadata, request.query_params.get("metadata") == "null")
        return list_object([job_object(one) for one in found], more)

    @router.get(PREFIX + "/{job_id}")
    def get(job_id: str) -> Object:
        job = found_job(store, job_id)
        return job_object(job, _estimated_finish(store, job))

    @router.post(PREFIX + "/{job_id}/cancel")
    def cancel(job_id: str) -> Object:
        under_way = ("validating_files", "queued", "running", "paused")
        return change(job_id, under_way, "cancelled", "The job was cancelled", finished_at=time.time())

    @router.post(PREFIX + "/{job_id}/pause")
    def pause(job_id: str) -> Object:
        return change(job_id, ("validating_files", "queued", "running"), "paused", "The job was paused")

    @router.post(PREFIX + "/{job_id}/resume")
    def resume(job_id: str) -> Object:
        job = found_job(store, job_id)
        status: JobStatus = "queued" if queue.is_prepared(job) else "validating_files"
        said = "The job was resumed, moving it to queued state"
        return change(job_id, ("paused", "cancelled", "failed"), status, said, finished_at=None, error=None)

    def change(job_id: str, only_from: tuple[str, ...], status: JobStatus, said: str, **values: object) -> Object:
        job = found_job(store, job_id)
        with store.together():
            if not store.change(job_id, only_from, status=status, **values):
                now = found_job(store, job_id).status
                wanted = ", ".join(only_from)
                raise ApiError(400, f"{job_id} is {now}; expected {wanted}", code="wrong_status")
            store.add_event(job.id, said)
        queue.wake()
        return job_object(found_job(store, job_id))

    return router


def found_job(store: Store, job_id: str) -> Job:
    """The job of an id; ApiError if there is none."""
    job = store.job(job_id)
    if job is None:
        raise ApiError(
            404, f"{job_id}: no such job; GET {PREFIX} lists those there are", param="fine_tuning_job_id",
            code="fine_tune_not_found",
        )  # fmt: skip
    return job


def _base_of(store: Store, served: Mapping[str, ModelConfig], name: str) -> Base:
    """What to train where a client asks for this model: a base, or one that an earlier job has made of a base."""
    if name in served:
        return Base(name, served[name])
    earlier = store.job_of_model(name)
    if earlier is None or store.is_deleted(name):
        names = ", ".join(served) or "no model"
        raise ApiError(
            400, f"model: {name} cannot be fine-tuned here; expected {names}, or a model of an earlier job (ft:…)",
            param="model", code="model_not_found",
        )  # fmt: skip
    return Base(earlier.base.name, earlier.base.model, earlier.id)


def _check_file(store: Store, param: str, name: str | None) -> None:
    file = None if name is None else store.file(name)
    if name is not None and file is None:
        raise ApiError(400, f"{param}: {name}: no such file; upload it first", param=param, code=f"invalid_{param}")
    if file is not None and file.purpose != "fine-tune":
        raise ApiError(
            400, f"{param}: {name} was uploaded for {file.purpose}; upload it with the purpose fine-tune", param=param,
            code=f"invalid_{param}",
        )  # fmt: skip


def _check_trackers(request: JobRequest) -> None:
    from lmtune.training.trackers import require_trackers

    try:
        require_trackers([one.type for one in request.integrations or ()])
    except ConfigError as error:
        said = str(error).replace("run.trackers", "integrations")
        raise ApiError(400, said, param="integrations", code="integration_not_installed") from None


def _estimated_finish(store: Store, job: Job) -> float | None:
    """When a job will have made its steps, in seconds of the epoch; None where its last steps do not tell."""
    if job.status != "running":
        return None
    found = [one for one in store.events(job.id, None, 2 * _RECENT)[0] if one.data and "train_loss" in one.data]
    if len(found) < 2:
        return None
    last, first = found[0], found[-1]
    steps = [one.data or {} for one in (first, last)]
    begin, end, total = steps[0]["step"], steps[1]["step"], steps[1].get("total_steps")
    if not (isinstance(begin, int) and isinstance(end, int) and isinstance(total, int)) or end <= begin:
        return None
    return last.created_at + (total - end) * (last.created_at - first.created_at) / (end - begin)
