"""What a server says of itself: info, health, reflection, and where it listens."""

import asyncio
import socket

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub
from lorasrv.errors import ConfigError
from lorasrv.rpc.server import SERVICES, bind
from lorasrv_proto.v1.server_pb2 import GetServerInfoRequest
from rpc_fakes import DEFAULTS, FACTS, FakeRecord, Service, serving

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING


def test_info_tells_facts_limits_defaults_and_load() -> None:
    async def scenario() -> None:
        async with serving(records=[FakeRecord(adapter_id="a"), FakeRecord(adapter_id="b")]) as service:
            info = await service.info.GetServerInfo(GetServerInfoRequest())
            for name in ("version", "base_model", "base_digest", "device", "dtype", "exact", "native_kernels"):
                assert getattr(info, name) == getattr(FACTS, name), name
            for name in ("max_num_seqs", "max_batched_tokens", "max_queue", "max_rank", "max_adapters"):
                assert getattr(info.limits, name) == getattr(FACTS, name), name
            assert (info.limits.max_model_len_tokens, info.limits.vocab_size) == (64, 256)
            assert info.limits.max_stop_strings > 0
            assert info.limits.max_stop_token_ids > 0
            assert info.limits.max_logprobs > 0
            for name in ("max_new_tokens", "temperature", "top_k", "top_p", "ignore_eos"):
                assert getattr(info.sampling_defaults, name) == getattr(DEFAULTS, name), name
            assert (info.num_running, info.num_queued, info.num_adapters) == (0, 3, 2)
            assert info.max_adapters_in_one_step == 5
            assert not info.draining
            assert "adapter-kind-dora" in info.features

    asyncio.run(scenario())


async def _health(service: Service, name: str) -> int:
    return (await HealthStub(service.channel).Check(HealthCheckRequest(service=name), timeout=10)).status


def test_health_goes_from_starting_over_serving_to_draining() -> None:
    async def scenario() -> None:
        async with serving() as service:
            names = ("", "ready", *SERVICES)
            for change, ready in (
                (service.health.starting, NOT_SERVING),
                (service.health.serving, SERVING),
                (service.health.draining, NOT_SERVING),
            ):
                await change()
                assert [await _health(service, name) for name in names] == [ready] * len(names)
                assert await _health(service, "live") == SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await _health(service, "lorasrv.v1.NoSuchService")
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND

    asyncio.run(scenario())


def test_reflection_lists_every_service() -> None:
    async def scenario() -> None:
        async with serving() as service:
            call = ServerReflectionStub(service.channel).ServerReflectionInfo(
                iter([ServerReflectionRequest(list_services="")])
            )
            answers = [answer async for answer in call]
            names = {entry.name for answer in answers for entry in answer.list_services_response.service}
            assert names == {*SERVICES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
            assert set(SERVICES) == {
                "lorasrv.v1.GenerationService",
                "lorasrv.v1.AdapterService",
                "lorasrv.v1.ServerService",
            }

    asyncio.run(scenario())


def test_only_this_machine_reaches_a_server_unless_told_otherwise() -> None:
    async def scenario() -> None:
        server = grpc.aio.server()
        with pytest.raises(ConfigError, match="insecure"):
            bind(server, host="0.0.0.0", port=0)
        assert bind(server, host="0.0.0.0", port=0, insecure=True) > 0
        assert bind(server, host="localhost", port=0) > 0
        await server.stop(None)

    asyncio.run(scenario())


def test_a_taken_port_is_a_configuration_error() -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
            with pytest.raises(ConfigError, match="in use"):
                bind(server, host="127.0.0.1", port=taken.getsockname()[1])
            await server.stop(None)

    asyncio.run(scenario())
