"""A client of the app that speaks Gradio's protocol by hand, so that it can also speak it wrongly."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import httpx

JOIN = "/gradio_api/queue/join"
GOOD = [0, "tuned", "", 0, 1, 20, ""]  # model, mode, system, temperature, top p, most tokens, seed


class Client:
    """One session of Gradio's protocol."""

    def __init__(self, url: str, session: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=30)
        self.session = session
        self.dependencies = self.http.get("/config").json()["dependencies"]

    def join(self, name: str, data: list[Any]) -> httpx.Response:
        function = next(d["id"] for d in self.dependencies if d["api_name"] == name)
        body = {"data": data, "fn_index": function, "session_hash": self.session}
        headers = {"Content-Type": "application/json"}  # httpx's own JSON has no NaN
        return self.http.post(JOIN, content=json.dumps(body), headers=headers)

    def run(self, name: str, data: list[Any]) -> dict[str, Any]:
        """The last message of a call."""
        assert self.join(name, data).status_code == 200
        return self.wait_for("process_completed")

    def wait_for(self, kind: str) -> dict[str, Any]:
        """The first message of `kind` that comes."""
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as answer:
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    message: dict[str, Any] = json.loads(line[5:])
                    if message["msg"] == kind:
                        return message
        raise AssertionError("the stream ended too early")


def wait_until(happened: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)
