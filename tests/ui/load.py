"""Many clients of the app at once, as browsers are to it: each asks, reads its stream to the end, keeps the time."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Stream:
    """What one client has seen of one answer.

    Attributes:
        updates: when something new came, in seconds from the question on.
        text: the answer at the end; empty if there was none.
        said: the line under the chat.
        seconds: from the question to the end of the stream.
    """

    updates: list[float] = field(default_factory=list)
    text: str = ""
    said: str = ""
    seconds: float = 0.0

    @property
    def first(self) -> float:
        """Seconds until the first words."""
        return self.updates[0] if self.updates else float("inf")

    @property
    def longest_gap(self) -> float:
        """The longest wait between two updates."""
        return max((b - a for a, b in zip(self.updates, self.updates[1:], strict=False)), default=0.0)


async def ask_at_once(
    url: str, questions: Sequence[str], num_tokens: int, leave_after: float | None = None
) -> list[Stream]:
    """As many clients as there are questions ask at the same moment.

    Args:
        url: of the app.
        questions: one of each client; each client is a session of its own.
        num_tokens: of each answer.
        leave_after: seconds after which each closes its connection.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False) as client:
        dependencies = (await client.get("/config")).json()["dependencies"]
        send = next(d["id"] for d in dependencies if d["api_name"] == "send")
        mark = time.monotonic_ns()
        tasks = [
            asyncio.create_task(_ask(client, send, f"load-{mark}-{number}", question, num_tokens))
            for number, question in enumerate(questions)
        ]
        if leave_after is not None:
            await asyncio.sleep(leave_after)
            for task in tasks:
                task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        return [
            stream if isinstance(stream, Stream) else Stream(said=repr(stream))
            for stream in found
            if not isinstance(stream, asyncio.CancelledError)
        ]


async def _ask(client: httpx.AsyncClient, send: int, session: str, question: str, num_tokens: int) -> Stream:
    stream, begin = Stream(), time.monotonic()
    body = {"data": [question, 0, "tuned", "", 0, 1, num_tokens, ""], "fn_index": send, "session_hash": session}
    joined = await client.post("/gradio_api/queue/join", json=body)
    if joined.status_code != 200:
        stream.said, stream.seconds = joined.text, time.monotonic() - begin
        return stream
    async with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as answer:
        if answer.status_code != 200:
            stream.said, stream.seconds = (await answer.aread()).decode(), time.monotonic() - begin
            return stream
        async for line in answer.aiter_lines():
            if not line.startswith("data:"):
                continue
            message: dict[str, Any] = json.loads(line[5:])
            if (message["msg"] == "process_generating" and question in line) or (stream.updates and "append" in line):
                stream.updates.append(time.monotonic() - begin)
            if message["msg"] == "process_completed":
                break
    stream.seconds = time.monotonic() - begin
    output = message.get("output", {}).get("data", [])
    stream.text = output[1][-1]["content"][0]["text"] if output and isinstance(output[1], list) and output[1] else ""
    stream.said = str(output[3]) if len(output) > 3 else str(message.get("output"))
    return stream


def figures(streams: Sequence[Stream]) -> dict[str, float]:
    """Median and 99th percentile, in seconds, of what the clients saw."""
    found = {}
    for name in ("first", "longest_gap", "seconds"):
        values = sorted(getattr(stream, name) for stream in streams)
        found[f"{name} p50"] = statistics.median(values)
        found[f"{name} p99"] = values[min(len(values) - 1, int(0.99 * len(values)))]
    return found
