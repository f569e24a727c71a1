"""Files, jobs, events and checkpoints in the form that OpenAI's API gives them: plain objects of JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from lmtune.serve.fine_tuning.store import Job, JobEvent, StoredFile

Object = Mapping[str, object]


def file_object(file: StoredFile) -> Object:
    """A file."""
    return {
        "id": file.id, "object": "file", "bytes": file.bytes, "created_at": int(file.created_at), "expires_at": None,
        "filename": file.filename, "purpose": file.purpose, "status": "processed", "status_details": None,
    }  # fmt: skip


def job_object(job: Job, estimated_finish: float | None = None) -> Object:
    """A job; `estimated_finish` in seconds of the epoch."""
    request = job.request
    kind = request.kind
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "finished_at": None if job.finished_at is None else int(job.finished_at),
        "estimated_finish": None if estimated_finish is None else int(estimated_finish),
        "model": request.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": "lmtune",
        "status": job.status,
        "error": None if job.error is None else asdict(job.error),
        "training_file": request.training_file,
        "validation_file": request.validation_file,
        "result_files": [] if job.result_file is None else [job.result_file],
        "trained_tokens": job.trained_tokens,
        "hyperparameters": {key: value for key, value in job.hyperparameters.items() if key != "beta"},
        "method": {"type": kind, kind: {"hyperparameters": job.hyperparameters}},
        "seed": request.seed,
        "user_provided_suffix": request.suffix,
        "integrations": [one.model_dump(mode="json", exclude_none=True) for one in request.integrations or ()],
        "metadata": request.metadata,
    }


def event_object(event: JobEvent) -> Object:
    """An event; one with figures is of the type `metrics`."""
    is_step = event.data is not None and "train_loss" in event.data
    return {
        "id": event.id, "object": "fine_tuning.job.event", "created_at": int(event.created_at), "level": event.level,
        "message": event.message, "type": "metrics" if is_step else "message", "data": event.data or {},
    }  # fmt: skip


def list_object(items: Sequence[Object], has_more: bool) -> Object:
    """A page of a list."""
    ids = [item["id"] for item in items]
    return {
        "object": "list", "data": list(items), "has_more": has_more, "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
    }  # fmt: skip


def checkpoint_object(job: str, model: str, step: int, created_at: float, figures: Object) -> Object:
    """A checkpoint; `figures` are those of its step."""
    names = ("train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")
    return {
        "id": f"ftckpt-{job.removeprefix('ftjob-')}-{step}", "object": "fine_tuning.job.checkpoint",
        "created_at": int(created_at), "fine_tuned_model_checkpoint": f"{model}:ckpt-step-{step}",
        "fine_tuning_job_id": job, "step_number": step,
        "metrics": {"step": step, **{name: figures[name] for name in names if name in figures}},
    }  # fmt: skip
