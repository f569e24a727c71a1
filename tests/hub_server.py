"""A Hub of our own for tests: what pushing and pulling a model or Space and reading a data set need of its interface.

    with HubServer() as hub:
        hub.add("me/adapter", {"adapter_config.json": b"…"})
        subprocess.run([...], env={**os.environ, **hub.environment})

The real client talks to it (`HF_ENDPOINT`, read when huggingface_hub is imported, so in a process of its own). Every
request is kept with its body, so that a test can look for what should never have been sent. The name of a Space begins
with `spaces/`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "CanaryTokenForTests0123456789abcdef"
USER = "me"

Files = dict[str, bytes]


@dataclass
class Repository:
    """A repository: the files of each commit, and the commit of each branch."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        """Replace what `branch` holds; returns the commit."""
        content = repr((branch, len(self.commits), sorted(files.items()))).encode()
        sha = hashlib.sha1(content).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def find(self, revision: str) -> str | None:
        """The commit that a branch or commit names."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass(frozen=True)
class Request:
    """What a client has sent."""

    method: str
    path: str
    token: str | None
    body: bytes


class HubServer:
    """Serves on a free port of 127.0.0.1 while it is open."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: Files = {}  # large files by SHA-256
        self.requests: list[Request] = []
        self.broken: dict[str, int] = {}  # repositories that answer everything with this status
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """What a client process needs to talk to this server and no other."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}

    def add(self, name: str, files: Files, private: bool = False, gated: bool = False) -> Repository:
        """A repository that is there already."""
        self.repositories[name] = repository = Repository(private, gated)
        repository.commit("main", files)
        return repository

    def files(self, name: str, branch: str = "main") -> Files:
        """What a branch holds now."""
        repository = self.repositories[name]
        return repository.commits[repository.branches[branch]]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        request = Request(self.command, path, token, self._body())
        self.hub.requests.append(request)
        for name, status in self.hub.broken.items():
            if name in path:
                return self._refuse(status, "", "out of order")
        if token not in (None, TOKEN):
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        path = path.replace("/api/spaces/", "/api/models/spaces/", 1)
        for pattern, answer in _ROUTES:
            if match := re.fullmatch(pattern, path):
                return answer(self, request, **match.groupdict())
        return self._refuse(404, "", f"no such route: {path}")

    do_GET = do_POST = do_PUT = do_HEAD = _serve

    # --- answers

    def validate_yaml(self, request: Request) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def create(self, request: Request) -> None:
        wanted = json.loads(request.body)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if request.token is None:
            return self._refuse(401, "", "Invalid username or password.")
        if not name.startswith(f"{USER}/"):
            return self._refuse(403, "", f"You don't have the rights to create a model under {name}")
        if wanted.get("type") == "space":
            if wanted.get("sdk") != "gradio":
                return self._refuse(400, "", "a Space needs an sdk")
            name = f"spaces/{name}"
        if name in self.hub.repositories:
            return self._send(409, {"error": "exists already", "url": f"{self.hub.url}/{name}"})
        self.hub.add(name, {}, private=wanted.get("visibility") == "private" or wanted.get("private", False))
        return self._send(200, {"url": f"{self.hub.url}/{name}"})

    def branch(self, request: Request, name: str, branch: str) -> None:
        repository = self.hub.repositories[name]
        if branch in repository.branches:
            return self._send(409, {"error": "exists already"})
        repository.branches[branch] = repository.branches["main"]
        return self._send(200, {})

    def preupload(self, request: Request, name: str, revision: str) -> None:
        names = [file["path"] for file in json.loads(request.body)["files"]]
        kinds = {n: "lfs" if n.endswith(_LARGE) else "regular" for n in names}
        self._send(200, {"files": [{"path": n, "uploadMode": k, "shouldIgnore": False} for n, k in kinds.items()]})

    def lfs_batch(self, request: Request, name: str) -> None:
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.hub.url}/objects/{item['oid']}"}}}
            for item in json.loads(request.body)["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def upload(self, request: Request, oid: str) -> None:
        if hashlib.sha256(request.body).hexdigest() != oid:
            return self._refuse(400, "", "the checksum differs")
        self.hub.objects[oid] = request.body
        return self._send(200, {})

    def commit(self, request: Request, name: str, revision: str) -> None:
        repository = self.hub.repositories[name]
        files = dict(repository.commits[repository.branches[revision]])
        for line in request.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(revision, files)
        self._send(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def info(self, request: Request, name: str, revision: str | None) -> None:
        if (found := self._found(request, name, revision)) is None:
            return
        repository, sha = found
        siblings = [{"rfilename": path} for path in repository.commits[sha]]
        about = {"id": name, "modelId": name, "sha": sha, "private": repository.private, "tags": [], "downloads": 0}
        self._send(200, {**about, "siblings": siblings})

    def tree(self, request: Request, name: str, revision: str) -> None:
        if (found := self._found(request, name, revision)) is None:
            return
        repository, sha = found
        self._send(200, [_tree_entry(path, content) for path, content in repository.commits[sha].items()])

    def paths(self, request: Request, name: str, revision: str) -> None:
        if (found := self._found(request, name, revision)) is None:
            return
        repository, sha = found
        asked = parse_qs(request.body.decode()).get("paths", [])
        files = repository.commits[sha]
        self._send(200, [_tree_entry(path, files[path]) for path in asked if path in files])

    def resolve(self, request: Request, name: str, revision: str, file: str) -> None:
        if (found := self._found(request, name, revision)) is None:
            return
        repository, sha = found
        content = repository.commits[sha].get(file)
        if content is None:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        entry = _tree_entry(file, content)
        headers = {"ETag": f'"{entry["oid"]}"', "X-Repo-Commit": sha, "Content-Type": "application/octet-stream"}
        if large := entry.get("lfs"):
            headers |= {"X-Linked-ETag": f'"{large["oid"]}"', "X-Linked-Size": str(len(content))}
        self._send_bytes(200, content, headers)

    # --- plumbing

    def _found(self, request: Request, name: str, revision: str | None) -> tuple[Repository, str] | None:
        """The repository and commit, or None after a refusal like the Hub's."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and request.token is None):
            self._refuse(401 if request.token is None else 404, "RepoNotFound", "Repository not found")
        elif repository.gated:
            self._refuse(403, "GatedRepo", f"Access to model {name} is restricted")
        elif (sha := repository.find(revision or "main")) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repository, sha
        return None

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
        self._send_bytes(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, tree: Any) -> None:
        self._send_bytes(status, json.dumps(tree).encode(), {"Content-Type": "application/json"})

    def _send_bytes(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _tree_entry(path: str, content: bytes) -> dict[str, Any]:
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git}
    if path.endswith(_LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


_LARGE = (".safetensors", ".gguf")
_NAME = r"(?P<name>(?:spaces/)?[^/]+/[^/]+?)"
_ROUTES = (
    (r"/api/validate-yaml", _Handler.validate_yaml),
    (r"/api/repos/create", _Handler.create),
    (rf"/api/models/{_NAME}/branch/(?P<branch>.+)", _Handler.branch),
    (rf"/api/models/{_NAME}/preupload/(?P<revision>.+)", _Handler.preupload),
    (rf"/api/models/{_NAME}/commit/(?P<revision>.+)", _Handler.commit),
    (rf"/api/models/{_NAME}/tree/(?P<revision>[^/]+)", _Handler.tree),
    (rf"/api/models/{_NAME}(?:/revision/(?P<revision>.+))?", _Handler.info),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"/objects/(?P<oid>[0-9a-f]+)", _Handler.upload),
    (rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
    (rf"/api/datasets/{_NAME}/tree/(?P<revision>[^/]+)(?:/.*)?", _Handler.tree),
    (rf"/api/datasets/{_NAME}/paths-info/(?P<revision>[^/]+)", _Handler.paths),
    (rf"/api/datasets/{_NAME}(?:/revision/(?P<revision>.+))?", _Handler.info),
    (rf"/datasets/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
)
