"""A Hugging Face Hub on loopback that serves folders: as much of its HTTP as a snapshot download asks for."""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit


@dataclass(slots=True)
class Repository:
    """One model repository with a single commit."""

    folder: Path
    commit: str
    gated: bool = False
    branches: tuple[str, ...] = ("main",)


@dataclass(slots=True)
class FakeHub:
    """Serves repositories until the context ends; `endpoint` is its address."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requested: list[str] = field(default_factory=list)
    endpoint: str = ""
    _server: ThreadingHTTPServer | None = None

    def add(self, repo_id: str, folder: Path, *, gated: bool = False) -> str:
        """Publishes a folder and returns its commit."""
        commit = hashlib.sha1(repo_id.encode()).hexdigest()
        self.repositories[repo_id] = Repository(folder, commit, gated)
        return commit

    def __enter__(self) -> Self:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_GET

            def log_message(self, format: str, *args: object) -> None:
                """Stays silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path).strip("/")
        self.requested.append(path)
        parts = path.split("/")
        if parts[:2] == ["api", "models"]:
            repo_id, action, revision = "/".join(parts[2:4]), parts[4] if len(parts) > 4 else "", "/".join(parts[5:])
        else:
            repo_id, action, revision = "/".join(parts[:2]), parts[2] if len(parts) > 2 else "", parts[3]
        repository = self.repositories.get(repo_id)
        if repository is None:
            _send(request, 404, {"X-Error-Code": "RepoNotFound"})
        elif repository.gated:
            _send(request, 403, {"X-Error-Code": "GatedRepo"})
        elif action == "revision" and revision not in (repository.commit, *repository.branches):
            _send(request, 404, {"X-Error-Code": "RevisionNotFound"})
        elif action == "revision":
            _send(request, 200, {}, {"id": repo_id, "sha": repository.commit, "siblings": []})
        elif action == "tree":
            _send(request, 200, {}, _tree(repository.folder))
        else:
            _send_file(request, repository, "/".join(parts[4:]))


def _tree(folder: Path) -> list[dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": _etag(path)}
        for path in files
    ]


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def _send(request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: object = ()) -> None:
    body = json.dumps(content or {}).encode()
    request.send_response(status)
    for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
        request.send_header(key, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)


def _send_file(request: BaseHTTPRequestHandler, repository: Repository, name: str) -> None:
    path = repository.folder / name
    if not path.is_file():
        _send(request, 404, {"X-Error-Code": "EntryNotFound"})
        return
    request.send_response(200)
    request.send_header("Content-Length", str(path.stat().st_size))
    request.send_header("ETag", f'"{_etag(path)}"')
    request.send_header("X-Repo-Commit", repository.commit)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(path.read_bytes())
