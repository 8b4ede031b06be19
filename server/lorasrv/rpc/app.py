"""The composition root: a configuration becomes a server that runs until it is told to stop.

Puts the parts together and owns their ends; does nothing else.
"""

import asyncio
import gc
import logging
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial

from lorasrv.config import ServeConfig
from lorasrv.engine.engine import Engine
from lorasrv.engine.own_thread import in_own_thread
from lorasrv.errors import ConfigError
from lorasrv.metrics import MetricsServer
from lorasrv.rpc.adapters import AdapterServicer
from lorasrv.rpc.backend import Backend
from lorasrv.rpc.generation import GenerationServicer
from lorasrv.rpc.lifecycle import StopRequest, serve_until_stopped
from lorasrv.rpc.server import Health, ServerServicer, Servicers, bind, build_server
from lorasrv.rpc.streams import OutputStreams

# the engine thread waits this long, at most, for the event loop to give the interpreter lock back
_SWITCH_INTERVAL_SECONDS = 0.0005
# threads that only wait for files
_NUM_FILE_THREADS = 32

_log = logging.getLogger(__name__)


def serve(config: ServeConfig) -> int:
    """Loads and serves until SIGTERM or SIGINT, in the main thread.

    Sets the interpreter's switch interval, and takes what is loaded out of its garbage collection.

    Returns:
        The process's exit code.

    Raises:
        ConfigError: the address cannot be listened on, or the machine does not have what is asked for.
        ModelLoadError: the base cannot be served.
        AdapterError: an adapter named at start cannot be served.
    """
    # a large base takes minutes to load; a port that is taken should not wait for it
    _check_port(config.host, config.port)
    sys.setswitchinterval(_SWITCH_INTERVAL_SECONDS)
    backend = in_own_thread(partial(Backend.load, config))
    # what is there now stays; a full collection walks it, 120 ms for some 200 000 objects, while every step waits
    gc.collect()
    gc.freeze()
    return asyncio.run(_serve(backend))


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError([f"cannot listen on {host}:{port}: {error.strerror}"]) from error


async def _serve(backend: Backend) -> int:
    config = backend.config
    streams = OutputStreams(asyncio.get_running_loop())
    engine = backend.engine(streams.on_outputs)
    backend.metrics.read_state_from(lambda: backend.state(engine.stats()))
    health, stop = Health(), StopRequest()
    with _file_threads() as executor, _metrics_page(backend), engine, stop.on_signals():
        server = build_server(_servicers(backend, engine, streams, executor, health))
        port = bind(server, host=config.host, port=config.port, insecure=config.insecure)
        return await serve_until_stopped(
            server,
            address=f"{config.host}:{port}",
            health=health,
            engine=engine,
            drain_timeout_seconds=config.drain_timeout_seconds,
            stop=stop,
        )


def _servicers(
    backend: Backend, engine: Engine, streams: OutputStreams, executor: ThreadPoolExecutor, health: Health
) -> Servicers:
    facts, registry, metrics = backend.facts, backend.registry, backend.metrics
    return Servicers(
        generation=GenerationServicer(
            engine=engine,
            registry=registry,
            streams=streams,
            encode=backend.tokenizer.encode,
            limits=facts.limits,
            defaults=facts.defaults,
            executor=executor,
            observer=metrics,
        ),
        adapters=AdapterServicer(
            registry=registry,
            executor=executor,
            observer=metrics,
            is_draining=lambda: engine.stats().is_draining,
        ),
        server=ServerServicer(facts=facts, engine=engine, registry=registry, observer=metrics),
        health=health,
    )


@contextmanager
def _file_threads() -> Iterator[ThreadPoolExecutor]:
    executor = ThreadPoolExecutor(_NUM_FILE_THREADS, thread_name_prefix="adapters")
    try:
        yield executor
    finally:
        # a load that nobody waits for anymore must not hold up the end
        executor.shutdown(wait=False, cancel_futures=True)


def _metrics_page(backend: Backend) -> MetricsServer | nullcontext[None]:
    config = backend.config
    if not config.metrics_port:
        return nullcontext()
    try:
        page = MetricsServer(backend.metrics.registry, host=config.host, port=config.metrics_port)
    except OSError as error:
        raise ConfigError([f"cannot listen on {config.host}:{config.metrics_port}: {error.strerror}"]) from error
    _log.info("metrics are at http://%s:%d/metrics", config.host, page.port)
    return page
