"""Errors in the form that clients of OpenAI's API understand.

    raise ApiError(404, "model: nothing; expected support or tiny", param="model", code="model_not_found")

    {"error": {"message": "…", "type": "invalid_request_error", "param": "model", "code": "model_not_found"}}

The `openai` package makes of the status its exception, of `message` its text, and of `param` and `code` its attributes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from lmtune.errors import LmtuneError, UnavailableError
from lmtune.io.console import err, escape

_UNION = re.compile(
    r"(constrained-)?(str|int|float|bool|list|dict|tuple|literal|NamedTool)(\[.*)?"
)  # which of several types, of pydantic
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a client is told.

    Args:
        status: of HTTP.
        message: what is wrong, what is expected, what to do.
        param: the field of the request that it is about.
        code: a word for programs.
        headers: of the answer.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, object]:
        """As JSON."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = self.message.encode("utf-8", "replace").decode()  # what a client sent may hold an unpaired surrogate
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> Response:
        """As an answer of HTTP."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error that happened while it was answered."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnavailableError):
        return ApiError(503, str(error), code="engine_unavailable")
    if isinstance(error, LmtuneError):
        return ApiError(400, str(error))
    err.print(f"[red]error[/] {escape(type(error).__name__)}: {escape(str(error))}")
    return ApiError(500, "the server failed at this request; its terminal says more", code="internal_error")


def add_error_handlers(application: FastAPI) -> None:
    """Answer every error of the application's routes in this form."""

    async def respond(request: Request, error: Exception) -> Response:
        return as_api_error(error).response

    async def respond_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _of_fields(error.errors()).response

    async def respond_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, message, headers=error.headers).response

    application.add_exception_handler(ApiError, respond)
    application.add_exception_handler(LmtuneError, respond)
    application.add_exception_handler(RequestValidationError, respond_invalid)
    application.add_exception_handler(HTTPException, respond_http)
    application.add_exception_handler(Exception, respond)


def _of_fields(faults: Sequence[Mapping[str, Any]]) -> ApiError:
    """All fields that are wrong, each by its path; `param` is the first."""
    lines = []
    for fault in faults:
        if fault["type"] == "json_invalid":
            why = fault.get("ctx", {}).get("error", fault["msg"])
            lines.append(("body", f"body: not JSON at character {fault['loc'][-1]}: {why}"))
            continue
        parts = [str(part) for part in fault["loc"][1:]]
        place = ".".join(part for part in parts if not _UNION.fullmatch(part)) or str(fault["loc"][0])
        lines.append((place, f"{place}: {str(fault['msg']).removeprefix('Value error, ')}"))
    message = "; ".join(dict.fromkeys(line for _, line in lines))
    return ApiError(400, message, param=lines[0][0] if lines else None, code="invalid_value")
