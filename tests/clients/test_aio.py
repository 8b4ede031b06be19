"""The asyncio client against a fake server over real gRPC."""

import asyncio

import pytest
from lorasrv_client import AsyncClient, errors
from lorasrv_client.types import AdapterState, HealthStatus


def test_every_call_answers_as_the_synchronous_client(server):
    async def calls():
        async with AsyncClient(server.target) as client:
            loaded = await client.load_adapter("dora", "/x", replace=True)
            assert await client.get_adapter("dora") == loaded
            other = await client.load_adapter("lora", "/y")
            assert [adapter async for adapter in client.list_adapters(page_size=1)] == [loaded, other]
            whole = await client.generate("The sea", adapter_id="dora", max_new_tokens=4, seed=1)
            async with client.stream("The sea", adapter_id="dora", max_new_tokens=4, seed=1) as stream:
                pieces = [chunk.text async for chunk in stream]
                assert await stream.result() == whole
            assert "".join(pieces) == whole.text == "dora one two three "
            assert (await client.unload_adapter("dora")).state is AdapterState.UNLOADED
            assert (await client.server_info()).version == "9.9"
            assert await client.health() is HealthStatus.SERVING

    asyncio.run(calls())


def test_result_reads_what_is_left_of_the_stream(server):
    async def calls():
        async with AsyncClient(server.target) as client:
            return await client.stream("x", max_new_tokens=3).result()

    assert asyncio.run(calls()).token_ids == (0, 1, 2)


def test_errors_are_typed(server, fake):
    code = fake.grpc.StatusCode.RESOURCE_EXHAUSTED
    server.refusals = [fake.Refusal(code, "full", "QUEUE_FULL", fake.retry_info(2)) for _ in range(2)]

    async def calls():
        async with AsyncClient(server.target, retry=False) as client:
            with pytest.raises(errors.OverloadedError) as unary:
                await client.generate("x")
            with pytest.raises(errors.OverloadedError) as streamed:
                await client.stream("x").result()
            with pytest.raises(errors.AdapterNotFoundError):
                await client.generate("x", adapter_id="nobody")
            return unary.value, streamed.value

    for error in asyncio.run(calls()):
        assert (error.reason, error.retry_after_seconds) == ("QUEUE_FULL", 2.0)


def test_retries_obey_pushback(server, fake):
    code = fake.grpc.StatusCode.UNAVAILABLE
    server.refusals = [fake.Refusal(code, "soon", "ENGINE_DOWN", pushback_ms=10)] * 2

    async def calls():
        async with AsyncClient(server.target) as client:
            return await client.generate("x")

    assert asyncio.run(calls()).token_ids
    assert len(server.requests) == 3


def test_a_cancelled_task_cancels_its_call_in_the_server(server):
    server.hold.clear()

    async def calls():
        async with AsyncClient(server.target) as client:
            began = asyncio.Event()

            async def read():
                async for _ in client.stream("x", max_new_tokens=5):
                    began.set()

            task = asyncio.create_task(read())
            await asyncio.wait_for(began.wait(), 5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(server.cancelled.wait, 5)

    asyncio.run(calls())


def test_many_streams_run_together(server):
    server.hold.clear()

    async def calls():
        async with AsyncClient(server.target) as client:
            tasks = [asyncio.create_task(client.stream("x", max_new_tokens=4).result()) for _ in range(12)]
            while server.largest_batch < 12:
                await asyncio.sleep(0.01)
            server.hold.set()
            return await asyncio.gather(*tasks)

    assert len(asyncio.run(asyncio.wait_for(calls(), 20))) == 12
