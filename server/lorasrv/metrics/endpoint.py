"""The HTTP endpoint Prometheus scrapes, on a thread of its own.

Rendering holds the interpreter lock, which the engine needs; so a render is kept for up to a second and served to
everyone who asks meanwhile. Knows a collector, not what it collects.
"""

import http.server
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

# a scraper that connects and stays silent gives its thread back after this
_READ_TIMEOUT_SECONDS = 10.0


class MetricsServer:
    """Serves `GET /metrics` of one registry until closed.

    Serves from construction on; a context manager that closes on exit.

    Args:
        registry: what is rendered.
        host: address to listen on; loopback unless told otherwise, since metrics name adapters.
        port: port to listen on; 0 takes a free one.
        max_age_seconds: how old a render may be when it is served.
        clock: monotonic seconds.

    Raises:
        OSError: the address cannot be listened on.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        max_age_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        render = _CachedRender(registry, max_age_seconds=max_age_seconds, clock=clock)
        self._http = _HTTPServer((host, port), render)
        self._thread = threading.Thread(target=self._http.serve_forever, name="lorasrv-metrics", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port it listens on, also where 0 was asked for."""
        return int(self._http.server_address[1])

    def close(self) -> None:
        """Stops listening and joins the thread; a second call does nothing."""
        if self._thread.is_alive():
            self._http.shutdown()
            self._thread.join()
        self._http.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _CachedRender:
    """Renders the registry at most once per `max_age_seconds` and content type; callers meanwhile wait for it."""

    def __init__(self, registry: CollectorRegistry, *, max_age_seconds: float, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._max_age_seconds = max_age_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._rendered: dict[str, bytes] = {}
        self._rendered_at_seconds = float("-inf")

    def __call__(self, accept: str) -> tuple[str, bytes]:
        """Returns content type and body for the value of an Accept header."""
        encode, content_type = choose_encoder(accept)
        with self._lock:
            now = self._clock()
            if now - self._rendered_at_seconds >= self._max_age_seconds:
                self._rendered = {}
                self._rendered_at_seconds = now
            body = self._rendered.get(content_type)
            if body is None:
                body = self._rendered[content_type] = encode(self._registry)
        return content_type, body


class _HTTPServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], render: _CachedRender) -> None:
        host, port = address
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        self.render = render
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # the base class would look up the host's full name, which can block for seconds where there is no resolver
        socketserver.TCPServer.server_bind(self)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _HTTPServer  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = _READ_TIMEOUT_SECONDS

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self._answer(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"metrics are at /metrics\n")
            return
        self._answer(HTTPStatus.OK, *self.server.render(self.headers.get("Accept", "")))

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: a line for every scrape would drown the log."""

    def _answer(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
