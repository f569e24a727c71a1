"""Many clients of one endpoint at once: tokens a second, seconds until the first token and the end, memory.

    lmtune serve tiny --no-page --no-jobs &
    python -m benchmarks.serving http://127.0.0.1:8000/v1 --model tiny --clients 1 4 16 64 --pid $!

Any endpoint with OpenAI's streaming chat completions is measured in the same way. Each client asks once, all at the
same moment, with prompts that differ from the first word on, and gets exactly `--tokens` tokens where the endpoint
knows `logit_bias`, by which `--end` tokens are ruled out. `--leaving N` clients go away in the middle of their answers.
The key is in OPENAI_API_KEY.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

PROMPT = "Number {}: tell a long story about a shop, its owner, and everything that happens there on one long day."


async def ask(client: httpx.AsyncClient, body: dict[str, Any], leaves_after: int | None = None) -> dict[str, float]:
    """Seconds until the first token and the end, and how many chunks and tokens came."""
    began, first, chunks, tokens = time.perf_counter(), None, 0, 0
    async with client.stream("POST", "chat/completions", json=body) as answer:
        if answer.status_code != 200:
            raise SystemExit(f"{answer.status_code}: {(await answer.aread()).decode()[:500]}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
            choices = chunk.get("choices") or [{}]
            if (choices[0].get("delta") or {}).get("content"):
                first = first or time.perf_counter() - began
                chunks += 1
                if leaves_after is not None and chunks >= leaves_after:
                    break
    return {"first": first or 0.0, "end": time.perf_counter() - began, "tokens": tokens or chunks}


def resident(pid: int | None) -> float | None:
    """A process's memory in GiB."""
    if pid is None:
        return None
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 2**20


async def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One result for each number of clients."""
    headers = {"authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}"}
    limits, found = httpx.Limits(max_connections=None), list[dict[str, Any]]()
    common: dict[str, Any] = {"model": options.model, "max_tokens": options.tokens, "temperature": 0, "stream": True,
                              "stream_options": {"include_usage": True}}  # fmt: skip
    if options.end:
        common["logit_bias"] = {str(token): -100.0 for token in options.end}
    number = 0

    def body() -> dict[str, Any]:
        nonlocal number
        number += 1
        return {**common, "messages": [{"role": "user", "content": PROMPT.format(number)}]}

    async with httpx.AsyncClient(base_url=options.url, headers=headers, timeout=600, limits=limits) as client:
        await ask(client, {**body(), "max_tokens": 4})  # what is slow once
        for count in [count for count in options.clients for _ in range(options.repeats)]:
            began = time.perf_counter()
            answers = await asyncio.gather(*(ask(client, body()) for _ in range(count)))
            seconds = time.perf_counter() - began
            tokens = sum(answer["tokens"] for answer in answers)
            result = {"clients": count, "tokens_per_second": round(tokens / seconds, 1), "tokens": tokens,
                      "memory_gib": resident(options.pid)}  # fmt: skip
            for what in ("first", "end"):
                values = [answer[what] for answer in answers]
                result |= {f"{what}_p50": round(float(np.percentile(values, 50)), 3),
                           f"{what}_p99": round(float(np.percentile(values, 99)), 3)}  # fmt: skip
            found.append(result)
            print(json.dumps(result), flush=True)
        if options.leaving:
            before = resident(options.pid)
            await asyncio.gather(*(ask(client, body(), leaves_after=3) for _ in range(options.leaving)))
            await asyncio.sleep(1)
            after = await ask(client, body())
            left = {"left": options.leaving, "memory_before_gib": before, "memory_gib": resident(options.pid),
                    "end_of_the_next": round(after["end"], 3)}  # fmt: skip
            found.append(left)
            print(json.dumps(left), flush=True)
    return found


def main() -> None:
    """Measure an endpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="ends in /v1")
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--end", type=int, nargs="*", default=[], help="token ids that end an answer, to be ruled out")
    parser.add_argument("--leaving", type=int, default=0)
    parser.add_argument("--pid", type=int, help="the server's process, for its memory")
    options = parser.parse_args()
    options.url = options.url.rstrip("/") + "/"
    asyncio.run(measure(options))


if __name__ == "__main__":
    main()
