"""A running app: the page behind its middleware, on a free port, with a parrot for a model."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from lmtune.inference.load import LoadedModel
from tests.chat_models import parrot

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE = 20_000  # milliseconds; CI machines are slow


@dataclass
class RunningApp:
    """Where the app is, and what goes on in it.

    Attributes:
        url: where it is.
        activity: the answers under way.
    """

    url: str
    activity: Any


def start(
    *models: LoadedModel, auth: str | None = None, examples: Sequence[Sequence[str]] = ()
) -> Iterator[RunningApp]:
    """Serve `models` in a thread until the iterator goes on."""
    import uvicorn

    from lmtune.serve.server import Address, build_application
    from lmtune.serve.studio.conversation import Activity

    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # as the server's own
    listening.bind(("127.0.0.1", 0))
    listening.listen(256)
    port = listening.getsockname()[1]
    activity = Activity()
    application = build_application(models, Address(port=port, auth=auth), activity, examples)
    config = uvicorn.Config(
        application, log_level="error", loop="asyncio", http="h11", ws="none", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield RunningApp(f"http://127.0.0.1:{port}", activity)
    server.should_exit = True
    thread.join(10)
    listening.close()


@pytest.fixture(scope="session")
def app() -> Iterator[RunningApp]:
    """A tuned parrot that takes 10 ms a token, with two examples."""
    yield from start(parrot(0.01), examples=[["Where do customers park their cars?", "system"]])


@pytest.fixture(scope="session")
def start_app() -> Callable[..., Iterator[RunningApp]]:
    """`start`, for an app of a test's own."""
    return start


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One Chromium for a file of tests: while Playwright is there, its event loop runs in the thread of the tests, and
    no test of another file could run one of its own."""
    from playwright.sync_api import expect, sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        missing = "no Chromium on this machine; install it, for example with `apt-get install chromium`"
        if os.environ.get("LMTUNE_REQUIRE_BROWSER") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()
