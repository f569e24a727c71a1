"""A server of JSON on this machine, for tests of what asks one."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# From path, body (none of a GET) and Authorization header to status and answer: a tree, or bytes as they are
Answer = Callable[[str, dict[str, Any] | None, str | None], tuple[int, Any]]


@contextlib.contextmanager
def json_server(answer: Answer) -> Iterator[str]:
    """The address of a server, with `/v1`, for as long as the block lasts; requests come in threads of their own."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self._send(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def do_GET(self) -> None:
            self._send(None)

        def _send(self, body: dict[str, Any] | None) -> None:
            status, tree = answer(self.path, body, self.headers["Authorization"])
            data = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
            with contextlib.suppress(OSError):  # who asked may be gone
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
