"""What a server takes and answers, as plain Python values.

The names are those of the wire contract (`lorasrv_proto.v1`), where each field is described at length. Nothing here
knows protobuf or gRPC.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TypedDict


class SamplingOptions(TypedDict, total=False):
    """How to generate. An option that is not given, or is None, is not sent: the server's default holds.

    Attributes:
        max_new_tokens: The most tokens to generate.
        temperature: Divides the logits; 0 is greedy decoding.
        top_k: Sample among the k most likely tokens; 0 considers all.
        top_p: Sample among the likeliest tokens whose probabilities first reach this sum.
        seed: The same request with the same seed gives the same tokens on the same server.
        stop: Strings before which generation ends.
        stop_token_ids: Tokens at which generation ends.
        ignore_eos: Go on past the model's end of sequence.
        logprobs: Report log-probabilities, and of this many alternatives each.
    """

    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool | None
    logprobs: int | None


class FinishReason(StrEnum):
    """Why generation ended."""

    UNKNOWN = "unknown"
    STOP = "stop"
    LENGTH = "length"
    EOS = "eos"


class AdapterKind(StrEnum):
    """The method an adapter was trained with."""

    UNKNOWN = "unknown"
    LORA = "lora"
    RSLORA = "rslora"
    DORA = "dora"
    ADALORA = "adalora"


class AdapterState(StrEnum):
    """Whether new requests may name an adapter."""

    UNKNOWN = "unknown"
    READY = "ready"
    DRAINING = "draining"
    UNLOADED = "unloaded"


class HealthStatus(StrEnum):
    """What a server says of its own health."""

    UNKNOWN = "unknown"
    SERVING = "serving"
    NOT_SERVING = "not_serving"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Counts of tokens read and generated."""

    prompt_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds, measured by the server, from arrival to the first step and to the first token."""

    queue_seconds: float
    time_to_first_token_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token's natural log-probability; `top` holds (token id, log-probability), likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A whole answer.

    Attributes:
        text: The generated text, without the prompt.
        token_ids: The generated tokens, without the prompt.
        finish_reason: Why generation ended.
        usage: Counts of tokens.
        adapter_digest: Names the weights that answered; empty for the base model.
        logprobs: One entry per token if log-probabilities were asked for, else empty.
        timings: How long the phases took.
        seed: The seed that was used, given or drawn.
        stop_string: The stop string that ended generation, if one did.
        stop_token_id: The token that ended generation, if one did.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    adapter_digest: str
    logprobs: tuple[TokenLogprob, ...]
    timings: Timings
    seed: int
    stop_string: str | None
    stop_token_id: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of an answer; `text` holds whole characters and may be empty."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter a server knows.

    Attributes:
        adapter_id: The name requests use.
        source: Where it was loaded from.
        digest: sha256 over its config and tensors, 64 hex digits.
        kind: The method it was trained with.
        min_rank: The smallest rank among its modules.
        max_rank: The largest rank among its modules.
        total_rank: The sum of the ranks of its modules.
        num_modules: How many linear layers it changes.
        num_bytes: Bytes of its tensors as served.
        num_in_use: Requests, waiting or running, that hold this version.
        state: Whether new requests may name it.
        load_time: When this version was loaded, UTC; None if the server does not tell.
    """

    adapter_id: str
    source: str
    digest: str
    kind: AdapterKind
    min_rank: int
    max_rank: int
    total_rank: int
    num_modules: int
    num_bytes: int
    num_in_use: int
    state: AdapterState
    load_time: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What requests and adapters must stay within; names and units are those of the wire contract."""

    max_model_len_tokens: int
    vocab_size: int
    max_num_seqs: int
    max_batched_tokens: int
    max_queue: int
    max_rank: int
    max_adapters: int
    max_stop_strings: int
    max_stop_token_ids: int
    max_logprobs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What an option means that is not given."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    ignore_eos: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What a server is and what it is doing; names are those of the wire contract."""

    version: str
    base_model: str
    base_digest: str
    limits: Limits
    sampling_defaults: SamplingDefaults
    features: tuple[str, ...]
    device: str
    dtype: str
    exact: bool
    native_kernels: bool
    max_adapters_in_one_step: int
    num_running: int
    num_queued: int
    num_adapters: int
    draining: bool
