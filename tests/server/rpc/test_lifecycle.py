"""From ready over draining to stopped, with real calls in flight."""

import asyncio
import os
import signal

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from lorasrv.rpc.lifecycle import CUT_OFF, DRAINED, INTERRUPTED, StopRequest, serve_until_stopped
from lorasrv_proto.v1.generation_pb2 import GenerateRequest
from rpc_fakes import PIECES, Service, bound, script


def _run(service: Service, stop: StopRequest, *, drain_timeout_seconds: float = 30.0) -> "asyncio.Task[int]":
    return asyncio.create_task(
        serve_until_stopped(
            service.server,
            address=service.address,
            health=service.health,
            engine=service.engine,
            drain_timeout_seconds=drain_timeout_seconds,
            stop=stop,
        )
    )


def _generate(service: Service) -> "asyncio.Future[object]":
    return asyncio.ensure_future(service.generation.Generate(GenerateRequest(prompt="hi"), wait_for_ready=True))


async def _not_serving(service: Service) -> None:
    watch = HealthStub(service.channel).Watch(HealthCheckRequest(service="ready"))
    while (await asyncio.wait_for(watch.read(), 10)).status != HealthCheckResponse.NOT_SERVING:
        pass
    watch.cancel()


def test_a_drained_server_finishes_what_runs_and_refuses_what_is_new(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="lorasrv")

    async def scenario() -> None:
        async with bound(answers=False) as service:
            stop = StopRequest()
            serving = _run(service, stop)
            first = _generate(service)
            request = await asyncio.wait_for(service.engine.submitted.get(), 10)
            assert f"listening on 127.0.0.1:{service.port}" in caplog.messages
            stop.signal()
            await _not_serving(service)
            while not service.engine.is_draining:
                await asyncio.sleep(0)
            refused = service.generation.Generate(GenerateRequest(prompt="hi"))
            assert await refused.code() is grpc.StatusCode.UNAVAILABLE
            assert "drain" in await refused.details()
            assert not serving.done()
            for output in script(request):
                service.engine.emit(output)
            assert (await asyncio.wait_for(first, 10)).text == "".join(PIECES)
            assert await asyncio.wait_for(serving, 10) == DRAINED
            assert service.engine.is_closed

    asyncio.run(scenario())


def test_what_does_not_finish_in_time_is_cut_off() -> None:
    async def scenario() -> None:
        async with bound(answers=False) as service:
            stop = StopRequest()
            serving = _run(service, stop, drain_timeout_seconds=0.01)
            call = _generate(service)
            await asyncio.wait_for(service.engine.submitted.get(), 10)
            stop.signal()
            assert await asyncio.wait_for(serving, 10) == CUT_OFF
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "engine" in (caught.value.details() or "")

    asyncio.run(scenario())


def test_the_second_signal_ends_it_at_once() -> None:
    async def scenario() -> None:
        async with bound(answers=False) as service:
            stop = StopRequest()
            with stop.on_signals():
                serving = _run(service, stop)
                call = _generate(service)
                await asyncio.wait_for(service.engine.submitted.get(), 10)
                os.kill(os.getpid(), signal.SIGTERM)
                await _not_serving(service)
                assert not serving.done()
                os.kill(os.getpid(), signal.SIGTERM)
                assert await asyncio.wait_for(serving, 10) == INTERRUPTED
            with pytest.raises(grpc.aio.AioRpcError):
                await call

    asyncio.run(scenario())
