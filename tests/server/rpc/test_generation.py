"""Generation over real gRPC, on a scripted engine."""

import asyncio
import json
import os
import sys
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from lorasrv.engine.request import RequestOutput
from lorasrv.errors import EngineStepError, QueueFullError
from lorasrv_proto.v1.generation_pb2 import (
    FINISH_REASON_STOP,
    GenerateRequest,
    GenerateStreamRequest,
    GenerateStreamResponse,
)
from rpc_fakes import PIECES, FakeRecord, Service, serving

ALICE = FakeRecord(adapter_id="alice")
CLIENT = Path(__file__).with_name("client_process.py")


async def _stream(service: Service, request: GenerateRequest) -> list[GenerateStreamResponse]:
    return [message async for message in service.generation.GenerateStream(GenerateStreamRequest(request=request))]


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


def test_unary_answer_has_every_field() -> None:
    async def scenario() -> None:
        async with serving(records=[ALICE]) as service:
            answer = await service.generation.Generate(GenerateRequest(adapter_id="alice", prompt="hi", logprobs=2))
            assert answer.text == "".join(PIECES)
            assert list(answer.token_ids) == [10, 11, 12, 13]
            assert answer.finish_reason == FINISH_REASON_STOP
            assert (answer.usage.prompt_tokens, answer.usage.generated_tokens) == (3, 4)
            assert answer.adapter_digest == ALICE.digest
            assert [entry.token_id for entry in answer.logprobs] == [10, 11, 12, 13]
            assert [(top.token_id, top.logprob) for top in answer.logprobs[0].top] == [(10, -0.5), (9, -1.5)]
            assert (answer.timings.queue_seconds, answer.timings.time_to_first_token_seconds) == (0.125, 0.25)
            assert (answer.seed, answer.stop_string) == (77, "!")
            assert not answer.HasField("stop_token_id")
            assert service.observer.calls == [("Generate", "OK", "stop")]
            assert service.registry.num_held == 0

    asyncio.run(scenario())


def test_the_base_answers_without_a_digest() -> None:
    async def scenario() -> None:
        async with serving() as service:
            answer = await service.generation.Generate(GenerateRequest(token_ids=[5, 6]))
            assert answer.adapter_digest == ""
            assert service.engine.requests[0].prompt_token_ids == (5, 6)
            assert service.engine.requests[0].lease is None

    asyncio.run(scenario())


def test_stream_equals_unary_and_ends_with_one_finish() -> None:
    async def scenario() -> None:
        async with serving(records=[ALICE]) as service:
            request = GenerateRequest(adapter_id="alice", prompt="hi", logprobs=1)
            whole = await service.generation.Generate(request)
            *chunks, last = await _stream(service, request)
            assert all(message.WhichOneof("event") == "chunk" for message in chunks)
            assert last.WhichOneof("event") == "finish"
            assert "".join(message.chunk.text for message in chunks) == whole.text
            assert [token for message in chunks for token in message.chunk.token_ids] == list(whole.token_ids)
            assert [entry for message in chunks for entry in message.chunk.logprobs] == list(whole.logprobs)
            for name in ("finish_reason", "usage", "adapter_digest", "timings", "seed", "stop_string"):
                assert getattr(last.finish, name) == getattr(whole, name), name
            assert service.observer.calls[-1] == ("GenerateStream", "OK", "stop")

    asyncio.run(scenario())


def test_a_chunk_arrives_before_the_answer_is_complete() -> None:
    async def scenario() -> None:
        async with serving(answers=False) as service:
            call = service.generation.GenerateStream(GenerateStreamRequest(request=GenerateRequest(prompt="hi")))
            request = await asyncio.wait_for(service.engine.submitted.get(), 10)
            service.engine.emit(RequestOutput(request_id=request.request_id, text="On", token_ids=(1,)))
            assert (await call.read()).chunk.text == "On"
            service.engine.emit(RequestOutput(request_id=request.request_id, token_ids=(2,)))
            silent = (await call.read()).chunk
            assert (silent.text, list(silent.token_ids)) == ("", [2])
            call.cancel()
            await _gone(service)

    asyncio.run(scenario())


def test_a_client_in_another_process_gets_the_same_answer_both_ways() -> None:
    async def scenario() -> None:
        async with serving(records=[ALICE]) as service:
            client = await _client(service)
            out, _ = await asyncio.wait_for(client.communicate(), 60)
            assert client.returncode == 0
            answer = json.loads(out)
            assert answer["unary"] == answer["stream"] == ["Once upon a time", [10, 11, 12, 13]]

    asyncio.run(scenario())


def test_a_client_that_is_killed_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        async with serving(answers=False, records=[ALICE]) as service:
            client = await _client(service)
            await asyncio.wait_for(service.engine.submitted.get(), 60)
            assert service.registry.num_held == 1
            client.kill()
            await _gone(service)
            await client.communicate()

    asyncio.run(scenario())


async def _client(service: Service) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        str(CLIENT),
        service.address,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_a_cancelled_call_frees_its_request(method: str) -> None:
    async def scenario() -> None:
        async with serving(answers=False, records=[ALICE]) as service:
            request = GenerateRequest(adapter_id="alice", prompt="hi")
            call = (
                service.generation.Generate(request)
                if method == "Generate"
                else service.generation.GenerateStream(GenerateStreamRequest(request=request))
            )
            submitted = await asyncio.wait_for(service.engine.submitted.get(), 10)
            service.engine.emit(RequestOutput(request_id=submitted.request_id, text="On", token_ids=(1,)))
            call.cancel()
            await _gone(service)
            assert service.observer.calls == [(method, "CANCELLED", "")]

    asyncio.run(scenario())


def test_a_passed_deadline_frees_the_request_and_the_engine_knew_it() -> None:
    async def scenario() -> None:
        async with serving(answers=False, records=[ALICE]) as service:
            request = GenerateRequest(adapter_id="alice", prompt="hi")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await service.generation.Generate(request, timeout=0.3)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await _gone(service)
            submitted = service.engine.requests[0]
            assert submitted.deadline_seconds is not None
            assert 0 < submitted.deadline_seconds - submitted.arrival_seconds <= 0.31

    asyncio.run(scenario())


def test_a_caller_that_leaves_while_its_adapter_is_read_leaves_no_lease() -> None:
    async def scenario() -> None:
        async with serving(records=[ALICE]) as service:
            service.registry.may_go_on.clear()
            call = service.generation.Generate(GenerateRequest(adapter_id="alice", prompt="hi"))
            assert await asyncio.to_thread(service.registry.entered.wait, 10)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            # the client knows before the server does
            await asyncio.wait_for(service.observer.a_call_finished.wait(), 10)
            service.registry.may_go_on.set()
            # a second request gets through, and only its own lease was ever left
            await service.generation.Generate(GenerateRequest(adapter_id="alice", prompt="hi"))
            assert len(service.engine.requests) == 1
            assert service.registry.num_held == 0

    asyncio.run(scenario())


def test_many_requests_for_a_cold_adapter_take_one_thread_and_hold_up_nobody() -> None:
    async def scenario() -> None:
        async with serving(records=[ALICE]) as service:
            service.registry.may_go_on.clear()
            cold = [
                asyncio.ensure_future(service.generation.Generate(GenerateRequest(adapter_id="alice", prompt="hi")))
                for _ in range(8)
            ]
            assert await asyncio.to_thread(service.registry.entered.wait, 10)
            answer = await service.generation.Generate(GenerateRequest(prompt="hi"), timeout=10)
            assert answer.text == "".join(PIECES)
            assert service.registry.num_acquiring == 1
            service.registry.may_go_on.set()
            await asyncio.gather(*cold)
            assert service.registry.num_held == 0

    asyncio.run(scenario())


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
