"""What a generation is refused with, or ends with: its status, its details, and what it leaves behind."""

import asyncio
import json

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from lorasrv.engine.request import RequestOutput
from lorasrv.errors import EngineStepError, QueueFullError
from lorasrv_proto.v1.generation_pb2 import (
    GenerateRequest,
    GenerateStreamRequest,
)
from rpc_fakes import PIECES, FakeRecord, Service, serving

ALICE = FakeRecord(adapter_id="alice")


async def _details(call: grpc.aio.Call, kind: type) -> list[object]:
    status = await rpc_status.aio.from_call(call)
    assert status is not None
    found = []
    for packed in status.details:
        if packed.Is(kind.DESCRIPTOR):
            found.append(kind())
            packed.Unpack(found[-1])
    return found


async def _gone(service: Service) -> None:
    """Waits until the engine was told, and checks that nothing is left behind."""
    await asyncio.wait_for(service.engine.cancelled.get(), 10)
    assert not service.engine.live
    assert service.registry.num_held == 0
    assert len(service.streams) == 0


def test_unknown_adapter_is_not_found_and_never_the_base() -> None:
    async def scenario() -> None:
        async with serving() as service:
            call = service.generation.Generate(GenerateRequest(adapter_id="ghost", prompt="hi"))
            assert await call.code() is grpc.StatusCode.NOT_FOUND
            (info,) = await _details(call, error_details_pb2.ErrorInfo)
            assert (info.reason, info.domain, dict(info.metadata)) == (
                "ADAPTER_NOT_FOUND",
                "lorasrv",
                {"adapter_id": "ghost"},
            )
            (resource,) = await _details(call, error_details_pb2.ResourceInfo)
            assert resource.resource_name == "ghost"
            assert service.engine.requests == []

    asyncio.run(scenario())


def test_every_violation_is_listed_under_its_path() -> None:
    async def scenario() -> None:
        async with serving() as service:
            request = GenerateRequest(
                adapter_id="../etc",
                prompt="hi",
                token_ids=[1, 999],
                max_new_tokens=0,
                temperature=-1,
                top_p=0,
                stop=[""],
                stop_token_ids=[256],
                logprobs=1000,
            )
            call = service.generation.GenerateStream(GenerateStreamRequest(request=request))
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
            (info,) = await _details(call, error_details_pb2.ErrorInfo)
            assert info.reason == "INVALID_REQUEST"
            (bad,) = await _details(call, error_details_pb2.BadRequest)
            names = "adapter_id token_ids token_ids[1] stop_token_ids[0] max_new_tokens temperature top_p stop logprobs"
            assert {violation.field for violation in bad.field_violations} == {
                f"request.{name}" for name in names.split()
            }

    asyncio.run(scenario())


def test_a_stream_without_a_request_is_invalid() -> None:
    async def scenario() -> None:
        async with serving() as service:
            call = service.generation.GenerateStream(GenerateStreamRequest())
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
            (bad,) = await _details(call, error_details_pb2.BadRequest)
            assert [violation.field for violation in bad.field_violations] == ["request"]

    asyncio.run(scenario())


def test_metadata_for_routers_must_name_the_same_adapter() -> None:
    async def scenario() -> None:
        async with serving(records=[ALICE]) as service:
            request = GenerateRequest(adapter_id="alice", prompt="hi")
            await service.generation.Generate(request, metadata=(("x-lorasrv-adapter", "alice"),))
            call = service.generation.Generate(request, metadata=(("x-lorasrv-adapter", "bob"),))
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(scenario())


def test_full_queue_says_when_to_come_back_and_keeps_no_lease() -> None:
    async def scenario() -> None:
        async with serving(records=[ALICE]) as service:
            service.engine.error = QueueFullError(capacity=16, retry_after_seconds=0.2505)
            call = service.generation.Generate(GenerateRequest(adapter_id="alice", prompt="hi"))
            assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            (info,) = await _details(call, error_details_pb2.ErrorInfo)
            assert (info.reason, dict(info.metadata)) == ("QUEUE_FULL", {"capacity": "16"})
            (retry,) = await _details(call, error_details_pb2.RetryInfo)
            assert retry.retry_delay.ToMilliseconds() == 251
            assert dict(await call.trailing_metadata())["grpc-retry-pushback-ms"] == "251"
            assert service.registry.num_held == 0
            assert len(service.streams) == 0

    asyncio.run(scenario())


def test_a_client_with_a_retry_policy_comes_back_by_itself() -> None:
    policy = {
        "methodConfig": [
            {
                "name": [{"service": "lorasrv.v1.GenerationService"}],
                "retryPolicy": {
                    "maxAttempts": 3,
                    "initialBackoff": "0.01s",
                    "maxBackoff": "0.01s",
                    "backoffMultiplier": 1,
                    "retryableStatusCodes": ["RESOURCE_EXHAUSTED"],
                },
            }
        ]
    }

    async def scenario() -> None:
        async with serving() as service:
            errors = iter([QueueFullError(capacity=1, retry_after_seconds=0.01)] * 2)
            submit = service.engine.submit

            def busy_twice(request: object) -> None:
                if error := next(errors, None):
                    raise error
                submit(request)  # type: ignore[arg-type]

            service.engine.submit = busy_twice  # type: ignore[method-assign]
            options = (("grpc.service_config", json.dumps(policy)), ("grpc.enable_retries", 1))
            async with grpc.aio.insecure_channel(service.address, options=options) as service.channel:
                answer = await service.generation.Generate(GenerateRequest(prompt="hi"))
            assert answer.text == "".join(PIECES)
            assert [code for _, code, _ in service.observer.calls] == ["RESOURCE_EXHAUSTED"] * 2 + ["OK"]

    asyncio.run(scenario())


def test_a_stream_that_is_not_read_ends_alone() -> None:
    async def scenario() -> None:
        async with serving(answers=False, records=[ALICE], max_pending=4) as service:
            call = service.generation.GenerateStream(
                GenerateStreamRequest(request=GenerateRequest(adapter_id="alice", prompt="hi"))
            )
            request = await asyncio.wait_for(service.engine.submitted.get(), 10)
            # all in one turn of the loop, so that no reader gets in between
            for token in range(6):
                service.engine.emit(RequestOutput(request_id=request.request_id, text="x", token_ids=(token,)))
            await _gone(service)
            assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            (info,) = await _details(call, error_details_pb2.ErrorInfo)
            assert (info.reason, dict(info.metadata)) == ("SLOW_READER", {"limit": "4"})

    asyncio.run(scenario())


def test_an_error_in_the_middle_of_a_stream_is_its_status() -> None:
    async def scenario() -> None:
        async with serving(answers=False) as service:
            call = service.generation.GenerateStream(GenerateStreamRequest(request=GenerateRequest(prompt="hi")))
            request = await asyncio.wait_for(service.engine.submitted.get(), 10)
            service.engine.emit(RequestOutput(request_id=request.request_id, text="On", token_ids=(1,)))
            assert (await call.read()).chunk.text == "On"
            service.engine.emit(RequestOutput(request_id=request.request_id, error=EngineStepError("f00d")))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.INTERNAL
            assert service.engine.cancelled.empty()

    asyncio.run(scenario())


def test_a_bug_is_told_to_the_log_and_not_to_the_client(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with serving() as service:
            service.engine.error = KeyError("/secret/path")
            call = service.generation.Generate(GenerateRequest(prompt="hi"))
            assert await call.code() is grpc.StatusCode.INTERNAL
            (info,) = await _details(call, error_details_pb2.ErrorInfo)
            assert info.reason == "INTERNAL"
            assert await call.details() == f"internal error {info.metadata['error_id']}"
            assert "secret" not in repr(await call.trailing_metadata())
            (record,) = (record for record in caplog.records if record.name == "lorasrv.rpc.status")
            assert record.error_id == info.metadata["error_id"]
            assert record.exc_info is not None
            assert "secret" in repr(record.exc_info[1])

    asyncio.run(scenario())


def test_the_request_id_is_echoed_or_made() -> None:
    async def scenario() -> None:
        async with serving() as service:
            call = service.generation.Generate(GenerateRequest(prompt="hi"), metadata=(("x-request-id", "abc-1"),))
            await call
            assert dict(await call.initial_metadata())["x-request-id"] == "abc-1"
            assert service.engine.requests[0].request_id.startswith("abc-1")
            call = service.generation.Generate(GenerateRequest(prompt="hi"))
            await call
            assert len(dict(await call.initial_metadata())["x-request-id"]) == 36
            call = service.generation.Generate(GenerateRequest(), metadata=(("x-request-id", "abc-2"),))
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert dict(await call.trailing_metadata())["x-request-id"] == "abc-2"

    asyncio.run(scenario())
