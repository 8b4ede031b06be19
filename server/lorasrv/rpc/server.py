"""ServerService, and the gRPC server that all services run in: options, address, health, reflection.

Knows no model; what the server is, it is told as `ServerFacts`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from lorasrv_proto.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

from lorasrv.config import is_loopback
from lorasrv.errors import ConfigError
from lorasrv.rpc.convert import server as convert
from lorasrv.rpc.edge import Context, served
from lorasrv.rpc.ports import CallObserver, EnginePort, RegistryPort

MAX_MESSAGE_BYTES = 8 * 1024 * 1024

SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (generation_pb2, "GenerationService"),
        (adapters_pb2, "AdapterService"),
        (server_pb2, "ServerService"),
    )
)
"""Full names of the services of lorasrv.v1."""

LIVE, READY = "live", "ready"

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.max_concurrent_streams", 4096),
    # two servers on one port would share the calls between them without a word
    ("grpc.so_reuseport", 0),
    # clients that keep quiet connections alive during long answers must not be told to go away
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
)


class ServerServicer(server_pb2_grpc.ServerServiceServicer):
    """Serves lorasrv.v1.ServerService.

    Args:
        facts: what does not change while the server runs.
        engine: asked what it is doing.
        registry: asked how many adapters there are.
        observer: told how calls end.
    """

    def __init__(
        self, *, facts: convert.ServerFacts, engine: EnginePort, registry: RegistryPort, observer: CallObserver
    ) -> None:
        self._facts = facts
        self._engine = engine
        self._registry = registry
        self._observer = observer

    async def GetServerInfo(
        self,
        request: server_pb2.GetServerInfoRequest,  # noqa: ARG002
        context: Context,
    ) -> server_pb2.GetServerInfoResponse:
        """Reports what the server is and what it is doing."""
        async with served("GetServerInfo", context, observer=self._observer):
            num_adapters = len(self._registry.list())
            return convert.server_info(self._facts, stats=self._engine.stats(), num_adapters=num_adapters)


class Health:
    """What health checks answer: "live" while the process serves, everything else while it takes new requests."""

    def __init__(self) -> None:
        self.servicer = health.aio.HealthServicer()

    async def starting(self) -> None:
        """Alive, but not ready."""
        await self._set(is_ready=False)

    async def serving(self) -> None:
        """Ready for requests."""
        await self._set(is_ready=True)

    async def draining(self) -> None:
        """Alive, and no longer ready."""
        await self._set(is_ready=False)

    async def _set(self, *, is_ready: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if is_ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", READY, *SERVICES):
            await self.servicer.set(service, status)
        await self.servicer.set(LIVE, health_pb2.HealthCheckResponse.SERVING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Servicers:
    """Everything a server answers with."""

    generation: generation_pb2_grpc.GenerationServiceServicer
    adapters: adapters_pb2_grpc.AdapterServiceServicer
    server: server_pb2_grpc.ServerServiceServicer
    health: Health


def build_server(servicers: Servicers, *, options: Sequence[tuple[str, int]] = ()) -> aio.Server:
    """Returns a server with all services, not yet bound and not yet started.

    Args:
        servicers: what it answers with.
        options: channel options beside, or instead of, the usual ones.
    """
    server = aio.server(options=(*_OPTIONS, *options))
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(servicers.generation, server)
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(servicers.adapters, server)
    server_pb2_grpc.add_ServerServiceServicer_to_server(servicers.server, server)
    health_pb2_grpc.add_HealthServicer_to_server(servicers.health.servicer, server)
    reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return server


def bind(server: aio.Server, *, host: str, port: int, insecure: bool = False) -> int:
    """Listens on an address, without encryption; returns the port, which is a free one where 0 was asked for.

    Raises:
        ConfigError: other machines can reach the address and `insecure` was not asked for, or it cannot be had.
    """
    if not is_loopback(host) and not insecure:
        raise ConfigError([f"{host} can be reached from other machines; ask for insecure, or listen on 127.0.0.1"])
    address = f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
    try:
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError([f"cannot listen on {address}; is the port in use?"]) from error
