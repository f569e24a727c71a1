"""`…/events` and `…/checkpoints` of a fine-tuning job: what has happened, page by page or as it happens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from lmtune.runs.store import checkpoint_folders, problem_of, step_of
from lmtune.serve.fine_tuning.jobs import PREFIX, Limit, found_job
from lmtune.serve.fine_tuning.objects import Object, checkpoint_object, event_object, list_object
from lmtune.serve.fine_tuning.queue import Queue
from lmtune.serve.fine_tuning.requests import model_name
from lmtune.serve.fine_tuning.store import Job, JobEvent, Store, event_id
from lmtune.serve.openai.errors import ApiError

_ENDED = ("succeeded", "failed", "cancelled")
_LOOK_SECONDS = 0.5


def events_router(store: Store, queue: Queue) -> APIRouter:
    """The routes of what a job does, over the jobs of a store and their runs."""
    router = APIRouter(tags=["fine-tuning"])

    @router.get(PREFIX + "/{job_id}/events", response_model=None)
    def events(job_id: str, after: str | None = None, limit: Limit = 20, stream: bool = False) -> Object | Response:
        job = found_job(store, job_id)
        cursor = None if after is None else store.event(after)
        if after is not None and (cursor is None or cursor.job != job.id):
            raise ApiError(400, f"after: {after}: no such event; expected the id of one in the list", param="after")
        if stream:
            return StreamingResponse(_told(store, job, cursor), media_type="text/event-stream")
        found, more = store.events(job.id, cursor, limit)
        return list_object([event_object(one) for one in found], more)

    @router.get(PREFIX + "/{job_id}/checkpoints")
    def checkpoints(job_id: str, after: str | None = None, limit: Limit = 10) -> Object:
        job = found_job(store, job_id)
        folders = [one for one in checkpoint_folders(queue.run_of(job).checkpoints) if problem_of(one) is None]
        name = model_name(job.base.name, job.request.suffix, job.id)
        items = [
            checkpoint_object(job.id, name, step_of(one), one.stat().st_mtime, _figures(store, job, step_of(one)))
            for one in reversed(folders)
        ]
        if after is not None:
            ids = [item["id"] for item in items]
            if after not in ids:
                raise ApiError(400, f"after: {after}: no such checkpoint", param="after")
            items = items[ids.index(after) + 1 :]
        return list_object(items[:limit], len(items) > limit)

    return router


def _figures(store: Store, job: Job, step: int) -> Mapping[str, object]:
    event = store.event(event_id(job.id, f"step-{step}"))
    return {} if event is None else event.data or {}


async def _told(store: Store, job: Job, cursor: JobEvent | None) -> AsyncIterator[str]:
    """The events of a job as server-sent ones, the oldest first, until it has ended; the last line is `[DONE]`."""
    while True:
        now = await run_in_threadpool(store.job, job.id)  # asked before reading, so that the last ones are not missed
        more = True
        while more:
            found, more = await run_in_threadpool(store.events, job.id, cursor, 100, "asc")
            for event in found:
                yield f"data: {json.dumps(event_object(event), ensure_ascii=False)}\n\n"
                cursor = event
        if now is None or now.status in _ENDED:
            yield "data: [DONE]\n\n"
            return
        await asyncio.sleep(_LOOK_SECONDS)
