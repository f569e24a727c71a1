"""Answers of other programs' servers: recorded once from a real one, and given again to the same requests.

    with recorded(file) as (url, missed):
        ...                                 # `missed` holds the requests that were not recorded

A recording is a file of JSON lines: what was served and what `lmtune verify` says of it, then each request and its
answer as the server wrote it. `python -m tests.recorded_server` makes one, see `tests/data/served/README.md`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from lmtune.demo import tiny_path
from lmtune.export.asking import choose_model
from lmtune.export.served import Served
from lmtune.export.verdict import Verification
from lmtune.export.verify import verify_endpoint
from lmtune.io.endpoint import Endpoint
from lmtune.runs.store import RunDirectory
from tests.json_server import json_server

RECORDINGS = Path(__file__).with_name("data") / "served"


def recorded_run(folder: Path) -> RunDirectory:
    """A copy in `folder` of the run that was served; what is the base's, it has from `tiny`."""
    run = RunDirectory(shutil.copytree(RECORDINGS / "shop", folder / "shop"))
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(tiny_path() / name, run.adapter / name)
    return run


def about(file: Path) -> dict[str, Any]:
    """What was served: `server`, `command`, `model`; and `verdict`, `weights`, `template`, `way` as they should be."""
    return dict(json.loads(file.read_text(encoding="utf-8").partition("\n")[0]))


@contextlib.contextmanager
def recorded(file: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a server that answers as the recorded one did, for as long as the block lasts."""
    _, *lines = file.read_text(encoding="utf-8").splitlines()
    answers = {_key(one["path"], one["request"]): (one["status"], one["answer"]) for one in map(json.loads, lines)}
    missed: list[str] = []

    def answer(path: str, body: dict[str, Any] | None, key: str | None) -> tuple[int, Any]:
        known = answers.get(_key(path, body))
        if known is None:
            missed.append(_key(path, body))
            return 418, {"error": "not recorded"}
        return known

    with json_server(answer) as url:
        yield url, missed


def verify(url: str, run: RunDirectory, model: str | None) -> Verification:
    """What `lmtune verify` finds there."""
    with Endpoint.at(url, "URL", (), sleep=lambda seconds: None) as endpoint:
        name, listed = choose_model(endpoint, model, run.name)
        return verify_endpoint(Served(endpoint, name), run, listed)


def _key(path: str, body: Mapping[str, Any] | None) -> str:
    return f"{path} {json.dumps(body, sort_keys=True)}"


def main(
    url: str, file: Path, server: str, command: str,
    model: Annotated[str | None, typer.Option()] = None,
) -> None:  # fmt: skip
    """Record what a real server at URL answers to `lmtune verify`."""
    lines, lock = list[str](), threading.Lock()
    client = httpx.Client(timeout=120)

    def answer(path: str, body: dict[str, Any] | None, key: str | None) -> tuple[int, Any]:
        with lock:
            given = client.request("GET" if body is None else "POST", url.removesuffix("/v1") + path, json=body)
            told = {"path": path, "request": body, "status": given.status_code, "answer": given.json()}
            lines.append(json.dumps(told, separators=(",", ":"), ensure_ascii=False))
        return given.status_code, given.json()

    with json_server(answer) as proxy, tempfile.TemporaryDirectory() as folder:
        found = verify(proxy, recorded_run(Path(folder)), model)
    variant = None if found.variant is None else found.variant.key
    head = {
        "server": server, "command": command, "model": model, "verdict": found.verdict, "weights": found.weights,
        "template": variant, "way": found.way,
    }  # fmt: skip
    file.write_text("\n".join([json.dumps(head, ensure_ascii=False), *lines]) + "\n", encoding="utf-8")
    print("\n".join(found.lines))


if __name__ == "__main__":
    typer.run(main)
