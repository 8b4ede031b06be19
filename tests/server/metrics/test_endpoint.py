"""The page Prometheus reads."""

import threading
import urllib.error
import urllib.request

import pytest
from lorasrv.metrics import MetricsServer
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.parser import text_string_to_metric_families


def get(server: MetricsServer, path: str = "/metrics", **headers: str) -> tuple[str, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.headers["Content-Type"], response.read().decode()


@pytest.fixture
def registry():
    """A registry whose one gauge counts how often it was read."""
    registry = CollectorRegistry()
    reads = iter(range(1, 100))
    Gauge("reads", "How often this was rendered.", registry=registry).set_function(lambda: next(reads))
    return registry


def test_serves_what_the_server_counted(exercised):
    with MetricsServer(exercised.registry) as server:
        content_type, body = get(server)
    assert content_type.startswith("text/plain; version=")
    names = {family.name for family in text_string_to_metric_families(body)}
    assert {"lorasrv_engine_steps", "lorasrv_requests_running", "lorasrv_time_to_first_token_seconds"} <= names


def test_serves_openmetrics_to_those_who_ask(exercised):
    with MetricsServer(exercised.registry) as server:
        content_type, body = get(server, Accept="application/openmetrics-text;version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith("# EOF\n")


def test_renders_once_a_second(registry):
    now = [0.0]
    with MetricsServer(registry, clock=lambda: now[0]) as server:
        first = get(server)
        now[0] = 0.9
        assert get(server) == first
        now[0] = 1.0
        assert get(server) != first


def test_other_pages_do_not_exist(registry):
    with MetricsServer(registry) as server, pytest.raises(urllib.error.HTTPError) as caught:
        get(server, "/")
    caught.value.close()
    assert caught.value.code == 404


def test_closes_its_port_and_its_thread(registry):
    before = threading.active_count()
    server = MetricsServer(registry)
    port = server.port
    server.close()
    server.close()
    assert threading.active_count() == before
    with pytest.raises(urllib.error.URLError, match="refused"):
        get(server)
    with MetricsServer(registry, port=port) as again:
        assert again.port == port


def test_a_port_in_use_is_an_error(registry):
    with MetricsServer(registry) as server, pytest.raises(OSError, match="in use"):
        MetricsServer(registry, port=server.port)
