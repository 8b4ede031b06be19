"""The server itself as a message: what is fixed at start, and what the engine is doing.

Knows neither model nor configuration: whoever composes the server says what it is in a `ServerFacts`.
"""

from dataclasses import dataclass

from lorasrv_proto.v1 import server_pb2

from lorasrv.engine.observer import EngineStats
from lorasrv.engine.request import MAX_LOGPROBS, MAX_STOP_STRINGS, SamplingParams
from lorasrv.rpc.convert.generation import MAX_STOP_TOKEN_IDS, RequestLimits

FEATURES = (
    "adapter-kind-lora",
    "adapter-kind-rslora",
    "adapter-kind-dora",
    "adapter-kind-adalora",
    "adapter-replace",
    "adapter-version-pin",
    "logprobs",
    "stop-strings",
    "token-ids-prompt",
)
"""What clients may ask for; a name is never taken back within one wire version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """What does not change while a server runs.

    Attributes:
        version: of lorasrv.
        base_model: as the operator named it.
        base_digest: of the base as served, 64 hex digits.
        device: "cpu", or "cuda" with its index.
        dtype: "bfloat16", "float16" or "float32".
        exact: whether neighbours cannot change a bit.
        native_kernels: whether the native CPU kernels are in use.
        limits: what the model allows a request.
        defaults: the values of sampling fields that are not set.
        max_num_seqs: most requests in one step.
        max_batched_tokens: most tokens in one step.
        max_queue: most requests that wait.
        max_rank: highest rank of an adapter in one module.
        max_adapters: most adapters on the device at a time.
    """

    version: str
    base_model: str
    base_digest: str
    device: str
    dtype: str
    exact: bool
    native_kernels: bool
    limits: RequestLimits
    defaults: SamplingParams
    max_num_seqs: int
    max_batched_tokens: int
    max_queue: int
    max_rank: int
    max_adapters: int


def server_info(facts: ServerFacts, *, stats: EngineStats, num_adapters: int) -> server_pb2.GetServerInfoResponse:
    """Returns the answer of GetServerInfo."""
    return server_pb2.GetServerInfoResponse(
        version=facts.version,
        base_model=facts.base_model,
        base_digest=facts.base_digest,
        limits=_limits(facts),
        sampling_defaults=_sampling_defaults(facts.defaults),
        features=FEATURES,
        device=facts.device,
        dtype=facts.dtype,
        exact=facts.exact,
        native_kernels=facts.native_kernels,
        max_adapters_in_one_step=stats.max_adapters_in_one_step,
        num_running=stats.num_running,
        num_queued=stats.num_queued,
        num_adapters=num_adapters,
        draining=stats.is_draining,
    )


def _limits(facts: ServerFacts) -> server_pb2.Limits:
    return server_pb2.Limits(
        max_model_len_tokens=facts.limits.max_model_len,
        vocab_size=facts.limits.vocab_size,
        max_num_seqs=facts.max_num_seqs,
        max_batched_tokens=facts.max_batched_tokens,
        max_queue=facts.max_queue,
        max_rank=facts.max_rank,
        max_adapters=facts.max_adapters,
        max_stop_strings=MAX_STOP_STRINGS,
        max_stop_token_ids=MAX_STOP_TOKEN_IDS,
        max_logprobs=MAX_LOGPROBS,
    )


def _sampling_defaults(defaults: SamplingParams) -> server_pb2.SamplingDefaults:
    return server_pb2.SamplingDefaults(
        max_new_tokens=defaults.max_new_tokens,
        temperature=defaults.temperature,
        top_k=defaults.top_k,
        top_p=defaults.top_p,
        ignore_eos=defaults.ignore_eos,
    )
