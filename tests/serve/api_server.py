"""The API over models of a test, behind a real server in a thread."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import openai
import uvicorn
from fastapi import FastAPI

from lmtune.inference.load import LoadedModel
from lmtune.serve.openai.answers import Answering
from lmtune.serve.openai.application import build_api
from lmtune.serve.openai.catalog import Catalog
from lmtune.serve.openai.metrics import Metrics

KEY = "secret"


@contextlib.contextmanager
def serving(application: FastAPI) -> Iterator[str]:
    """The address of an application while the block runs."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(256)
        config = uvicorn.Config(application, log_level="error", loop="asyncio", http="h11", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


@dataclass
class Api:
    """A server of models.

    Attributes:
        url: without `/v1`.
        answering: what it is doing.
    """

    url: str
    answering: Answering

    @property
    def client(self) -> openai.OpenAI:
        """OpenAI's own client, which tries nothing again."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    @property
    def http(self) -> httpx.Client:
        """For what that client cannot say."""
        return httpx.Client(base_url=f"{self.url}/v1", headers={"authorization": f"Bearer {KEY}"}, timeout=60)

    def is_idle(self, seconds: float = 5.0) -> bool:
        """Whether nothing is under way within so long."""
        end = time.monotonic() + seconds
        while self.answering.num_answering and time.monotonic() < end:
            time.sleep(0.02)
        return self.answering.num_answering == 0


@contextlib.contextmanager
def api_of(models: dict[str, LoadedModel], max_requests: int = 256, max_tokens: int = 64) -> Iterator[Api]:
    """Serve models by their names."""
    catalog, answering = Catalog(), Answering(Metrics(), max_requests)
    for name, loaded in models.items():
        catalog.add(name, loaded)
    application = build_api(catalog, answering, KEY, max_tokens=max_tokens)
    with serving(application) as url:
        try:
            yield Api(url, answering)
        finally:
            answering.stop_all()
            answering.close()
