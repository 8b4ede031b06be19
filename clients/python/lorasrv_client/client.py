"""The synchronous client.

    with Client("127.0.0.1:50051") as client:
        client.load_adapter("poet", "/srv/adapters/poet")
        print(client.generate("The sea", adapter_id="poet", max_new_tokens=40).text)

It may be used from several threads. Every call may raise a `ClientError`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self, Unpack

import grpc
from grpc_health.v1 import health_pb2
from lorasrv_proto.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2, generation_pb2_grpc, server_pb2
from lorasrv_proto.v1.server_pb2_grpc import ServerServiceStub

from lorasrv_client import convert
from lorasrv_client.channel import HEALTH_METHOD, channel_options
from lorasrv_client.errors import ServerError, from_rpc_error
from lorasrv_client.types import Adapter, Chunk, Generation, HealthStatus, SamplingOptions, ServerInfo


class _Call(Protocol):
    """The part of a gRPC stream call that `Stream` uses."""

    def __iter__(self) -> Iterator[generation_pb2.GenerateStreamResponse]: ...

    def cancel(self) -> bool | None: ...


class Client:
    """A connection to one server, opened at the first call and closed by `close` or at the end of `with`.

    Args:
        target: `HOST:PORT`, or any gRPC name.
        credentials: For an encrypted connection; None connects in plain text.
        retry: Whether calls a server cannot take now are tried again (see `lorasrv_client.channel`).
    """

    def __init__(self, target: str, *, credentials: grpc.ChannelCredentials | None = None, retry: bool = True) -> None:
        options = channel_options(retry=retry)
        self._channel = (
            grpc.insecure_channel(target, options=options)
            if credentials is None
            else grpc.secure_channel(target, credentials, options=options)
        )
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._adapters = adapters_pb2_grpc.AdapterServiceStub(self._channel)
        self._server = ServerServiceStub(self._channel)
        self._check_health = self._channel.unary_unary(
            HEALTH_METHOD,
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        adapter_id: str = "",
        timeout_seconds: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Generation:
        """Generate a whole answer.

        Args:
            prompt: Text, or token ids that are used as they are.
            adapter_id: Which adapter answers; empty for the base model, `id@digest` for one version.
            timeout_seconds: The deadline of the call; None waits as long as it takes.
            **sampling: See `SamplingOptions`; what is not given takes the server's default.
        """
        request = convert.generate_request(prompt, adapter_id=adapter_id, sampling=sampling)
        with typed_errors():
            return convert.generation(self._generation.Generate(request, timeout=timeout_seconds))

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        adapter_id: str = "",
        timeout_seconds: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> "Stream":
        """Generate an answer piece by piece; the arguments are those of `generate`."""
        request = convert.generate_request(prompt, adapter_id=adapter_id, sampling=sampling)
        message = generation_pb2.GenerateStreamRequest(request=request)
        return Stream(self._generation.GenerateStream(message, timeout=timeout_seconds))

    def load_adapter(
        self,
        adapter_id: str,
        source: str,
        *,
        replace: bool = False,
        expected_digest: str = "",
        timeout_seconds: float | None = None,
    ) -> Adapter:
        """Load an adapter while the server works; returns when requests may name it.

        Args:
            adapter_id: The name requests will use.
            source: A folder below one of the server's adapter roots, or `hf:org/name@revision`.
            replace: Put it in the place of other weights under this id; running requests keep the old ones.
            expected_digest: Refuse the adapter unless its digest begins so.
            timeout_seconds: When to stop waiting; the load itself goes on.
        """
        request = adapters_pb2.LoadAdapterRequest(
            adapter_id=adapter_id, source=source, replace=replace, expected_digest=expected_digest
        )
        with typed_errors():
            return convert.adapter(self._adapters.LoadAdapter(request, timeout=timeout_seconds).adapter)

    def unload_adapter(
        self, adapter_id: str, *, if_idle: bool = False, timeout_seconds: float | None = None
    ) -> Adapter:
        """Withdraw an adapter: new requests no longer find it, running ones finish.

        Args:
            adapter_id: The adapter's name.
            if_idle: Refuse while any request holds it.
            timeout_seconds: The deadline of the call.
        """
        mode = adapters_pb2.UNLOAD_MODE_IF_IDLE if if_idle else adapters_pb2.UNLOAD_MODE_DRAIN
        request = adapters_pb2.UnloadAdapterRequest(adapter_id=adapter_id, mode=mode)
        with typed_errors():
            return convert.adapter(self._adapters.UnloadAdapter(request, timeout=timeout_seconds).adapter)

    def get_adapter(self, adapter_id: str, *, timeout_seconds: float | None = None) -> Adapter:
        """What the server knows about one adapter."""
        request = adapters_pb2.GetAdapterRequest(adapter_id=adapter_id)
        with typed_errors():
            return convert.adapter(self._adapters.GetAdapter(request, timeout=timeout_seconds).adapter)

    def list_adapters(self, *, page_size: int = 0, timeout_seconds: float | None = None) -> Iterator[Adapter]:
        """All adapters, ordered by id; each page is fetched when it is needed, with its own deadline."""
        request = adapters_pb2.ListAdaptersRequest(page_size=page_size)
        while True:
            with typed_errors():
                page = self._adapters.ListAdapters(request, timeout=timeout_seconds)
            yield from map(convert.adapter, page.adapters)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def server_info(self, *, timeout_seconds: float | None = None) -> ServerInfo:
        """What the server is and what it is doing."""
        with typed_errors():
            return convert.server_info(
                self._server.GetServerInfo(server_pb2.GetServerInfoRequest(), timeout=timeout_seconds)
            )

    def health(self, service: str = "", *, timeout_seconds: float | None = None) -> HealthStatus:
        """The server's own word on its health; `service` is empty, "live", "ready" or a full service name."""
        with typed_errors():
            return convert.health(
                self._check_health(health_pb2.HealthCheckRequest(service=service), timeout=timeout_seconds)
            )

    def close(self) -> None:
        """Close the connection; running calls end with `CancelledError`."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Stream:
    """An answer as it is generated: iterate over its chunks once, then `result` is the whole.

    Leaving `with`, or calling `cancel`, before the end tells the server to stop.
    """

    def __init__(self, call: _Call) -> None:
        self._call = call
        self._chunks: list[Chunk] = []
        self._generation: Generation | None = None

    def __iter__(self) -> Iterator[Chunk]:
        """Yield the chunks that have not been read yet."""
        with typed_errors():
            for response in self._call:
                if response.HasField("finish"):
                    self._generation = convert.collected(self._chunks, response.finish)
                elif response.HasField("chunk"):
                    self._chunks.append(convert.chunk(response.chunk))
                    yield self._chunks[-1]

    def result(self) -> Generation:
        """The whole answer; reads what is left of the stream first.

        Raises:
            ServerError: The stream ended without a finish.
        """
        if self._generation is None:
            for _ in self:
                pass
        if self._generation is None:
            raise ServerError("the stream ended without a finish", code=grpc.StatusCode.INTERNAL)
        return self._generation

    def cancel(self) -> None:
        """Tell the server to stop; nothing if the stream has ended."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()


@contextmanager
def typed_errors() -> Iterator[None]:
    """Turn what gRPC raises inside the block into a `ClientError`."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None
