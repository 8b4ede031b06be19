"""A whole server in this process, its event loop on a thread of its own: the one `lorasrv serve` composes."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from lorasrv.config import ServeConfig
from lorasrv.rpc import app
from lorasrv.rpc.backend import Backend
from lorasrv.rpc.lifecycle import serve_until_stopped
from lorasrv.rpc.server import Health, bind, build_server
from lorasrv.rpc.streams import OutputStreams


@contextmanager
def real_server(config: ServeConfig) -> Iterator[str]:
    """Serves while the body runs; gives HOST:PORT."""
    address: Future[str] = Future()
    stop: Future[None] = Future()
    thread = threading.Thread(target=lambda: asyncio.run(_serve(config, address, stop)), name="real-server")
    thread.start()
    try:
        yield address.result()
    finally:
        stop.set_result(None)
        thread.join()


async def _serve(config: ServeConfig, address: "Future[str]", stop: "Future[None]") -> None:
    try:
        backend = await asyncio.to_thread(Backend.load, config)
        streams = OutputStreams(asyncio.get_running_loop())
        engine = backend.engine(streams.on_outputs)
        health, request = Health(), app.StopRequest()
        with app._file_threads() as executor, engine:
            server = build_server(app._servicers(backend, engine, streams, executor, health))
            port = bind(server, host="127.0.0.1", port=0)
            ended = asyncio.create_task(
                serve_until_stopped(
                    server,
                    address=f"127.0.0.1:{port}",
                    health=health,
                    engine=engine,
                    drain_timeout_seconds=10.0,
                    stop=request,
                )
            )
            address.set_result(f"127.0.0.1:{port}")
            await asyncio.wrap_future(stop)
            request.signal()
            await ended
    except BaseException as error:
        if not address.done():
            address.set_exception(error)
        raise
