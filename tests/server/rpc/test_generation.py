"""Generation over real gRPC, on a scripted engine."""

import asyncio
import json
import os
import sys
from pathlib import Path

import grpc
import pytest
from lorasrv.engine.request import RequestOutput
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
