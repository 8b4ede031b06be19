"""A server from its first answer to its last: ready, draining, stopped.

Knows when to stop, not what is served; whoever composes the server gives it the parts.
"""

import asyncio
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from grpc import aio

from lorasrv.rpc.server import Health

DRAINED, CUT_OFF, INTERRUPTED = 0, 1, 130
"""Exit codes: every request finished; some did not in time; a second signal came first."""

# for answers that are complete to reach their clients, once the engine has nothing left to do
_LAST_WRITES_SECONDS = 2.0

_log = logging.getLogger(__name__)


class Drainable(Protocol):
    """The part of the engine that ends; `lorasrv.engine.engine.Engine` has it."""

    def drain(self, timeout: float | None = None) -> bool:
        """Refuses new requests at once and waits for the others; returns whether all finished."""

    def close(self) -> None:
        """Ends what is left."""


class StopRequest:
    """What asks a server to stop: the first signal politely, the second one now."""

    def __init__(self) -> None:
        self.politely = asyncio.Event()
        self.now = asyncio.Event()

    def signal(self) -> None:
        """Counts one more signal; on the loop's thread."""
        (self.now if self.politely.is_set() else self.politely).set()

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Counts SIGTERM and SIGINT of the process while the body runs; main thread only."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self.signal)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)


async def serve_until_stopped(
    server: aio.Server,
    *,
    address: str,
    health: Health,
    engine: Drainable,
    drain_timeout_seconds: float,
    stop: StopRequest,
) -> int:
    """Starts a bound server, serves until asked to stop, and lets running requests finish.

    Args:
        server: bound, not started.
        address: HOST:PORT it is bound to, for the log.
        health: what its health checks answer.
        engine: started; closed on return.
        drain_timeout_seconds: how long running requests may finish.
        stop: asks to stop.

    Returns:
        The process's exit code.
    """
    await health.starting()
    await server.start()
    await health.serving()
    # the words are read by whoever started this process and waits for it
    _log.info("listening on %s", address)
    await stop.politely.wait()
    _log.info("draining", extra={"timeout_seconds": drain_timeout_seconds})
    await health.draining()
    code = await _drain(engine, timeout_seconds=drain_timeout_seconds, stop=stop)
    await asyncio.to_thread(engine.close)
    await server.stop(None if code == INTERRUPTED else _LAST_WRITES_SECONDS)
    _log.info("stopped", extra={"exit_code": code})
    return code


async def _drain(engine: Drainable, *, timeout_seconds: float, stop: StopRequest) -> int:
    drained = asyncio.create_task(asyncio.to_thread(engine.drain, timeout_seconds))
    interrupted = asyncio.create_task(stop.now.wait())
    await asyncio.wait((drained, interrupted), return_when=asyncio.FIRST_COMPLETED)
    if not drained.done():
        return INTERRUPTED
    interrupted.cancel()
    return DRAINED if drained.result() else CUT_OFF
