"""`/v1/files`: rows are uploaded, checked and listed; the results of jobs are downloaded.

Files for fine-tuning are JSON lines. Every line is checked as `lmtune check` does before the file is taken, so that a
job does not fail later: the answer names each faulty line with what to do.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import IO, Annotated

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from lmtune.data.checking import inspect_data
from lmtune.data.sources import shown_name
from lmtune.data.types import RowKind
from lmtune.errors import DataError
from lmtune.io.text import format_list, pluralize
from lmtune.serve.fine_tuning.objects import Object, file_object, list_object
from lmtune.serve.fine_tuning.store import Order, Store, StoredFile
from lmtune.serve.openai.errors import ApiError

MAX_BYTES = 512 * 2**20
_FORM_BYTES = 2**20  # of what stands around the file
PURPOSES = ("fine-tune", "batch", "user_data")
_SHOWN_FAULTS = 20
_TABLES = (".csv", ".tsv", ".xlsx", ".parquet")


def files_router(store: Store, max_bytes: int = MAX_BYTES) -> APIRouter:
    """The routes below `/v1/files`, over the files of a store."""
    router = APIRouter(tags=["files"])

    @router.post("/v1/files")
    async def upload(request: Request) -> Object:
        async with _form_of(request, max_bytes) as form:
            return file_object(await run_in_threadpool(_keep, store, form, max_bytes))

    @router.get("/v1/files")
    def list_files(
        after: str | None = None, limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000, order: Order = "desc",
        purpose: str | None = None,
    ) -> Object:  # fmt: skip
        cursor = None if after is None else store.file(after)
        if after is not None and cursor is None:
            raise ApiError(400, f"after: {after}: no such file; expected the id of one in the list", param="after")
        found, more = store.files(cursor, limit, order, purpose)
        return list_object([file_object(one) for one in found], more)

    @router.get("/v1/files/{file_id}")
    def get(file_id: str) -> Object:
        return file_object(_found(store, file_id))

    @router.get("/v1/files/{file_id}/content")
    def content(file_id: str) -> FileResponse:
        file = _found(store, file_id)
        return FileResponse(store.content_of(file), media_type="application/octet-stream", filename=file.filename)

    @router.delete("/v1/files/{file_id}")
    def delete(file_id: str) -> Object:
        file = _found(store, file_id)
        if users := store.users_of(file):
            raise ApiError(400, f"{file_id}: {', '.join(users)} needs it; cancel the job first", param="file_id")
        store.delete_file(file)
        return {"id": file_id, "object": "file", "deleted": True}

    return router


def row_faults(path: Path, filename: str, rows: RowKind | None) -> list[str]:
    """What is wrong with the rows of an uploaded file, `line 3: …` each.

    Args:
        path: of its content.
        filename: as the client calls it.
        rows: the kind that they must be of; None takes each as its keys say.
    """
    try:
        found = inspect_data([path], rows=rows).report
    except DataError as error:
        return [str(error).replace(str(path), filename)]
    before, rest = f"{shown_name(path)}:", found.num_faults - len(found.faults)
    faults = [f"line {fault.removeprefix(before)}".replace(path.name, filename) for fault in found.faults]
    return faults + ([f"{rest:,} further lines"] if rest else [])


def describe_faults(faults: list[str]) -> str:
    """One text that names them all, up to a number of them."""
    return f"{pluralize(len(faults), 'faulty line')}\n{format_list(faults, _SHOWN_FAULTS)}"


def _found(store: Store, file_id: str) -> StoredFile:
    file = store.file(file_id)
    if file is None:
        raise ApiError(404, f"{file_id}: no such file; GET /v1/files lists those there are", param="file_id")
    return file


@contextlib.asynccontextmanager
async def _form_of(request: Request, max_bytes: int) -> AsyncIterator[FormData]:
    """The fields of a multipart body, of bounded size; the file is on the disk, and gone after the block."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or options.get(b"charset", b"utf-8").lower() != b"utf-8":
        raise ApiError(400, "content-type: expected multipart/form-data with the fields file and purpose")

    async def bounded() -> AsyncGenerator[bytes, None]:
        count = 0
        async for piece in request.stream():
            count += len(piece)
            if count > max_bytes + _FORM_BYTES:
                raise _too_large(max_bytes)
            yield piece

    try:
        form = await MultiPartParser(request.headers, bounded(), max_files=1, max_fields=10).parse()
    except MultiPartException as error:
        raise ApiError(400, f"the body is not a multipart form: {error.message}") from None
    try:
        yield form
    finally:
        await form.close()


def _keep(store: Store, form: FormData, max_bytes: int) -> StoredFile:
    """Check an upload and take it into the store."""
    if unknown := sorted(set(form) - {"file", "purpose"}):
        raise ApiError(400, f"{unknown[0]}: not supported; send file and purpose", param=unknown[0])
    purpose, given = form.get("purpose"), form.get("file")
    if purpose not in PURPOSES or not isinstance(purpose, str):
        raise ApiError(400, f"purpose: {purpose}; expected {', '.join(PURPOSES)}", param="purpose")
    if not isinstance(given, UploadFile):
        raise ApiError(400, "file: missing; send the file's content as a file, with its name", param="file")
    if (given.size or 0) > max_bytes:
        raise _too_large(max_bytes)
    filename = (given.filename or "file").encode("utf-8", "replace").decode()
    with tempfile.TemporaryDirectory(prefix=".upload-", dir=store.files_folder) as folder:
        staged = Path(folder) / "rows.jsonl"
        with staged.open("wb") as file:
            shutil.copyfileobj(_plain(given), file, 2**20)
        faults = row_faults(staged, filename, None) if purpose == "fine-tune" else []
        if faults:
            is_table = Path(filename).suffix.lower() in _TABLES
            what = f"a table; expected JSON lines: lmtune prepare {filename} -o rows.jsonl" if is_table else (
                f"{describe_faults(faults)}\nfix them and upload the file again"
            )  # fmt: skip
            raise ApiError(400, f"file: {filename}: {what}", param="file", code="invalid_file_format")
        return store.add_file(staged, filename, purpose)


def _plain(given: UploadFile) -> IO[bytes]:
    """The content of an upload, from its beginning."""
    given.file.seek(0)
    return given.file


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"file: larger than {max_bytes:,} bytes; split the rows into several files", param="file")
