"""Between the wire's messages and this package's values; the one module that handles both.

It opens no channel and makes no call.
"""

from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC
from typing import Any, TypeVar

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from lorasrv_proto.v1 import adapters_pb2, generation_pb2, server_pb2

from lorasrv_client.types import (
    Adapter,
    AdapterKind,
    AdapterState,
    Chunk,
    FinishReason,
    Generation,
    HealthStatus,
    Limits,
    SamplingDefaults,
    SamplingOptions,
    ServerInfo,
    Timings,
    TokenLogprob,
    Usage,
)

_Value = TypeVar("_Value")

_FINISH_REASONS = {
    generation_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    generation_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    generation_pb2.FINISH_REASON_EOS: FinishReason.EOS,
}
_KINDS = {
    adapters_pb2.ADAPTER_KIND_LORA: AdapterKind.LORA,
    adapters_pb2.ADAPTER_KIND_RSLORA: AdapterKind.RSLORA,
    adapters_pb2.ADAPTER_KIND_DORA: AdapterKind.DORA,
    adapters_pb2.ADAPTER_KIND_ADALORA: AdapterKind.ADALORA,
}
_STATES = {
    adapters_pb2.ADAPTER_STATE_READY: AdapterState.READY,
    adapters_pb2.ADAPTER_STATE_DRAINING: AdapterState.DRAINING,
    adapters_pb2.ADAPTER_STATE_UNLOADED: AdapterState.UNLOADED,
}
_HEALTH = {
    health_pb2.HealthCheckResponse.SERVING: HealthStatus.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING: HealthStatus.NOT_SERVING,
}


def generate_request(
    prompt: str | Sequence[int], *, adapter_id: str, sampling: SamplingOptions
) -> generation_pb2.GenerateRequest:
    """The request for a prompt, given as text or as token ids. Options that are absent or None are not set.

    Raises:
        TypeError: An option that does not exist.
    """
    unknown = sorted(sampling.keys() - SamplingOptions.__annotations__.keys())
    if unknown:
        raise TypeError(f"no such sampling option: {', '.join(unknown)}")
    # None stays unset, as everywhere in protobuf
    options: dict[str, Any] = dict(sampling)
    if isinstance(prompt, str):
        return generation_pb2.GenerateRequest(adapter_id=adapter_id, prompt=prompt, **options)
    return generation_pb2.GenerateRequest(adapter_id=adapter_id, token_ids=prompt, **options)


def generation(response: generation_pb2.GenerateResponse) -> Generation:
    """The unary answer."""
    return Generation(
        text=response.text,
        token_ids=tuple(response.token_ids),
        logprobs=_logprobs(response.logprobs),
        **_finish(response),
    )


def collected(chunks: Sequence[Chunk], finish: generation_pb2.GenerateFinish) -> Generation:
    """The answer that a stream's chunks and its finish make up."""
    return Generation(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token_id for chunk in chunks for token_id in chunk.token_ids),
        logprobs=tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
        **_finish(finish),
    )


def chunk(message: generation_pb2.GenerateChunk) -> Chunk:
    """One piece of a stream."""
    return Chunk(text=message.text, token_ids=tuple(message.token_ids), logprobs=_logprobs(message.logprobs))


def adapter(message: adapters_pb2.Adapter) -> Adapter:
    """An adapter's record."""
    return _plain(
        Adapter,
        message,
        kind=_KINDS.get(message.kind, AdapterKind.UNKNOWN),
        state=_STATES.get(message.state, AdapterState.UNKNOWN),
        load_time=message.load_time.ToDatetime(tzinfo=UTC) if message.HasField("load_time") else None,
    )


def server_info(message: server_pb2.GetServerInfoResponse) -> ServerInfo:
    """The server's description."""
    return _plain(
        ServerInfo,
        message,
        limits=_plain(Limits, message.limits),
        sampling_defaults=_plain(SamplingDefaults, message.sampling_defaults),
        features=tuple(message.features),
    )


def health(message: health_pb2.HealthCheckResponse) -> HealthStatus:
    """What a health check says."""
    return _HEALTH.get(message.status, HealthStatus.UNKNOWN)


def _finish(message: generation_pb2.GenerateResponse | generation_pb2.GenerateFinish) -> dict[str, Any]:
    return {
        "finish_reason": _FINISH_REASONS.get(message.finish_reason, FinishReason.UNKNOWN),
        "usage": _plain(Usage, message.usage),
        "adapter_digest": message.adapter_digest,
        "timings": _plain(Timings, message.timings),
        "seed": message.seed,
        "stop_string": message.stop_string if message.HasField("stop_string") else None,
        "stop_token_id": message.stop_token_id if message.HasField("stop_token_id") else None,
    }


def _logprobs(entries: Sequence[generation_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            token_id=entry.token_id,
            logprob=entry.logprob,
            top=tuple((other.token_id, other.logprob) for other in entry.top),
        )
        for entry in entries
    )


def _plain(value_type: type[_Value], message: Message, /, **given: object) -> _Value:
    """A value whose fields are named as the message's; `given` holds those that need more than copying."""
    names = [entry.name for entry in fields(value_type) if entry.name not in given]  # type: ignore[arg-type]
    return value_type(**{name: getattr(message, name) for name in names}, **given)
