"""An endpoint that speaks OpenAI's protocol: its address, the key, requests that are tried again, errors in words.

    with Endpoint.at("http://127.0.0.1:8000/v1", option="--judge", keys=("LMTUNE_JUDGE_KEY",)) as endpoint:
        endpoint.models(), endpoint.post("/chat/completions", body)

The key comes from the environment and is written nowhere, not even where the endpoint repeats it in an error.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import httpx

from lmtune.errors import ConfigError, LmtuneError
from lmtune.io.console import warn
from lmtune.io.text import one_line

Tree = dict[str, object]

_TRIES = 4
_WAIT_SECONDS = 1.0  # before the second try; twice as long before each further one
_LONGEST_WAIT_SECONDS = 30.0
_AGAIN = (408, 409, 425, 429)  # and all from 500
_LOCAL = ("localhost", "127.0.0.1", "::1")
_PATHS = ("/chat/completions", "/completions")  # that people copy with the address


class RefusedError(ConfigError):
    """The endpoint refuses a request.

    Attributes:
        status: of HTTP.
        reason: what it says, in one line.
    """

    def __init__(self, message: str, status: int, reason: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


class FailingError(LmtuneError):
    """The endpoint does not answer, or fails, in several tries.

    Attributes:
        status: of HTTP; None where there was no answer.
    """

    def __init__(self, message: str, status: int | None) -> None:
        super().__init__(message)
        self.status = status


class Endpoint:
    """A server at an address.

    Attributes:
        option: what the user gave the address as; messages begin with it.
        stopped: set it, and no request is tried again.
    """

    def __init__(
        self, client: httpx.Client, address: httpx.URL, option: str, keys: Sequence[str] = (), advice: str = "",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        self.option, self.stopped = option, False
        self._client, self._address, self._keys, self._advice, self._sleep = client, address, keys, advice, sleep

    @classmethod
    def at(
        cls, url: str, option: str, keys: Sequence[str], advice: str = "", timeout_seconds: float = 120.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> Endpoint:  # fmt: skip
        """The endpoint at `url`, an address such as `http://127.0.0.1:8000/v1`.

        Args:
            url: with `/v1` or not.
            option: what the user gives the address as.
            keys: variables of the environment; the first that is set holds the key.
            advice: what to do where it does not answer.
            timeout_seconds: for one answer.
            sleep: waits between tries.

        Raises:
            ConfigError: no such address.
        """
        address = _address(url, option)
        name, key = _key(keys)
        if key and address.scheme == "http" and address.host not in _LOCAL:
            warn(f"{option}: http sends the key of {name} unencrypted to {address.host}; use https")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        client = httpx.Client(headers=headers, timeout=httpx.Timeout(timeout_seconds, connect=10.0))
        return cls(client, address, option, keys, advice, sleep)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) \
            -> None:  # fmt: skip
        self._client.close()

    @property
    def shown(self) -> str:
        """The address without what may be secret in it."""
        url = self._address
        return f"{url.scheme}://{url.netloc.decode().rpartition('@')[2]}{url.path}"

    def models(self) -> dict[str, str | None]:
        """The names of the models that it lists, each with the one that it is an adapter over, where it says so.

        Raises:
            RefusedError, FailingError: as of `post`.
        """
        listed = self._request("GET", "/models", None).get("data")
        models = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
        return {str(one.get("id")): str(one["parent"]) if one.get("parent") else None for one in models}

    def post(self, path: str, body: Mapping[str, object]) -> Tree:
        """What it answers, a JSON object.

        Raises:
            RefusedError: another status than 200 that a further try does not change.
            FailingError: no answer, or no JSON, in several tries.
        """
        return self._request("POST", path, body)

    def _request(self, method: str, path: str, body: Mapping[str, object] | None) -> Tree:
        problem, wait, status = "", _WAIT_SECONDS, None
        for attempt in range(_TRIES):
            if attempt and self.stopped:
                break
            if attempt:
                self._sleep(min(wait, _LONGEST_WAIT_SECONDS))
                wait *= 2
            try:
                answer = self._client.request(method, f"{self._address}{path}", json=body)
            except httpx.TransportError as error:
                problem, status = one_line(error), None
                continue
            status = answer.status_code
            if status in _AGAIN or status >= 500:
                problem = f"status {status}"
                wait = max(wait, _asked_wait(answer))
                continue
            if status != 200:
                hint = f"; set {' or '.join(self._keys)}" if status in (401, 403) else ""
                said = answer.text.replace(_key(self._keys)[1] or "\0", "…")
                reason = " ".join(said.split())[:200]
                raise RefusedError(f"{self.option}: {self.shown}: status {status}{hint}: {reason}", status, reason)
            try:
                tree = answer.json()
            except ValueError:
                tree = None
            if isinstance(tree, dict):
                return tree
            problem = "the answer is no JSON object"
        advice = f"; {self._advice}" if self._advice else ""
        raise FailingError(f"{self.option}: {self.shown}: {problem}, {_TRIES} times{advice}", status)


def _key(variables: Sequence[str]) -> tuple[str, str]:
    """The first variable that is set, and the key in it; empty where none is."""
    found = ((name, os.environ.get(name, "").strip()) for name in variables)
    return next(((name, key) for name, key in found if key), ("", ""))


def _address(url: str, option: str) -> httpx.URL:
    """Where the endpoint's paths begin."""
    try:
        address = httpx.URL(url.strip())
    except (httpx.InvalidURL, UnicodeError):
        address = httpx.URL("")
    if address.scheme not in ("http", "https") or not address.host:
        raise ConfigError(f"{option}: expected an address such as http://127.0.0.1:8000/v1")
    path = address.path.rstrip("/")
    for ending in _PATHS:
        path = path.removesuffix(ending)
    return address.copy_with(path=path or "/v1")


def _asked_wait(answer: httpx.Response) -> float:
    try:
        return float(answer.headers.get("Retry-After", 0))
    except ValueError:
        return 0.0
