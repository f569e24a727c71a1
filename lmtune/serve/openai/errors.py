"""Errors in the form that clients of OpenAI's API understand.

    raise ApiError(404, "model: nothing; expected support or tiny", param="model", code="model_not_found")

    {"error": {"message": "…", "type": "invalid_request_error", "param": "model", "code": "model_not_found"}}

The `openai` package makes of the status its exception, of `message` its text, and of `param` and `code` its attributes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from lmtune.data.values import kind_of
from lmtune.errors import LmtuneError, UnavailableError
from lmtune.io.console import err, escape

# What is expected, by the name of the fault: https://docs.pydantic.dev/latest/errors/validation_errors/
_EXPECTED = {
    "string_type": "a text", "int_type": "a whole number", "int_parsing": "a whole number",
    "int_from_float": "a whole number", "float_type": "a number", "float_parsing": "a number",
    "finite_number": "a finite number", "bool_type": "true or false", "bool_parsing": "true or false",
    "list_type": "a list", "tuple_type": "a list", "dict_type": "an object", "model_type": "an object",
    "model_attributes_type": "an object", "literal_error": "{expected}", "union_tag_invalid": "{expected_tags}",
    "union_tag_not_found": "an object with {discriminator}", "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}", "less_than": "less than {lt}", "less_than_equal": "at most {le}",
    "too_short": "at least {min_length} of them", "too_long": "at most {max_length} of them",
    "string_too_short": "at least {min_length} characters", "string_too_long": "at most {max_length} characters",
}  # fmt: skip
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class FieldError(ValueError):
    """Raised by a validator of a body for a field inside of it.

    Args:
        field: its path.
        message: what is wrong with it, and what to do.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


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
        return _of_fields(error.errors(), error.body).response

    async def respond_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, message, headers=error.headers).response

    application.add_exception_handler(ApiError, respond)
    application.add_exception_handler(LmtuneError, respond)
    application.add_exception_handler(RequestValidationError, respond_invalid)
    application.add_exception_handler(HTTPException, respond_http)
    application.add_exception_handler(Exception, respond)


def _of_fields(faults: Sequence[Mapping[str, Any]], body: object) -> ApiError:
    """All fields that are wrong, each by its path, with what each branch of a union wants; `param` is the first."""
    held, wanted, lines = dict[str, str](), dict[str, list[str]](), dict[str, str]()
    for fault in faults:
        if fault["type"] == "json_invalid":
            why = fault.get("ctx", {}).get("error", fault["msg"])
            lines["body"] = f"body: not JSON at character {fault['loc'][-1]}: {why}"
        elif fault["type"] == "value_error":
            error = fault["ctx"]["error"]
            own = error.field if isinstance(error, FieldError) else None
            place = own or _path_of(fault, body)
            lines[place] = str(error) if own else f"{place}: {error}"
        elif fault["type"] in ("extra_forbidden", "missing"):
            place = _path_of(fault, body)
            lines[place] = f"{place}: " + ("missing" if fault["type"] == "missing" else "unknown field; remove it")
        elif fault["loc"] == ("body",) and isinstance(fault.get("input"), (bytes, str)):
            lines["body"] = "body: not sent as JSON; expected an object, and the header content-type: application/json"
        else:
            place = _path_of(fault, body)
            held[place] = kind_of(fault.get("input"))
            known = _EXPECTED.get(fault["type"])  # any other text may hold braces of its own
            said = fault["msg"] if known is None else known.format_map(fault.get("ctx", {}))
            wanted.setdefault(place, []).append(said)
    for place, expected in wanted.items():
        if not any(other.startswith(f"{place}.") for other in (*wanted, *lines)):  # there a branch got further
            lines[place] = f"{place}: {held[place]}; expected {' or '.join(dict.fromkeys(expected))}"
    return ApiError(400, "; ".join(lines.values()), param=next(iter(lines), None), code="invalid_value")


def _path_of(fault: Mapping[str, Any], body: object) -> str:
    """Where it is; pydantic puts the names of a union's branches between the keys of the body."""
    source, *parts = fault["loc"]
    if source != "body":
        return ".".join(map(str, parts)) or str(source)
    keys, here = list[str](), body
    for number, part in enumerate(parts):
        is_key = isinstance(here, dict) and part in here
        if is_key or (isinstance(here, list) and isinstance(part, int) and part < len(here)):
            here = here[part]  # type: ignore[index]
        elif fault["type"] != "missing" or number < len(parts) - 1:
            continue
        keys.append(str(part))
    return ".".join(keys) or "body"
