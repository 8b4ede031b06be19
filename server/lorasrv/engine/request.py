"""What goes into the engine and what comes out of it: requests, sampling parameters, outputs.

Plain values, checked where they are made. This module knows no tensor, no tokenizer and no wire format.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from lorasrv.errors import InvalidRequestError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_SEED = 2**64 - 1


class Lease(Protocol):
    """One request's hold on one version of an adapter; `release` may be called from any thread, and twice."""

    @property
    def adapter_id(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def image(self) -> object: ...

    def release(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when to end.

    Attributes:
        max_new_tokens: tokens to generate at most, from 1.
        temperature: 0 chooses the most probable token, ties going to the lower id.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of tokens of at least this probability, in (0, 1].
        seed: key of the generator, 64 bits unsigned; whoever makes the request draws one where none was given.
        stop: strings that end the text; the text ends before them.
        stop_token_ids: tokens that end the text; they are counted and listed but not part of the text.
        ignore_eos: go on past the model's own end tokens.
        logprobs: None for none, else how many alternatives to list beside the chosen token's log probability.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        violations = tuple(_violations(self))
        if violations:
            raise InvalidRequestError(violations)


def _violations(params: SamplingParams) -> Iterator[tuple[str, str]]:
    if params.max_new_tokens < 1:
        yield "max_new_tokens", f"must be at least 1, is {params.max_new_tokens}"
    # written so that NaN fails, too
    if not 0.0 <= params.temperature <= 100.0:
        yield "temperature", f"must be between 0 and 100, is {params.temperature}"
    if params.top_k < 0:
        yield "top_k", f"must be 0 (off) or more, is {params.top_k}"
    if not 0.0 < params.top_p <= 1.0:
        yield "top_p", f"must be above 0 and at most 1, is {params.top_p}"
    if not 0 <= params.seed <= MAX_SEED:
        yield "seed", f"must fit 64 bits unsigned, is {params.seed}"
    if len(params.stop) > MAX_STOP_STRINGS:
        yield "stop", f"at most {MAX_STOP_STRINGS} strings, are {len(params.stop)}"
    for text in params.stop:
        if not 1 <= len(text) <= MAX_STOP_LENGTH:
            yield "stop", f"each must have 1 to {MAX_STOP_LENGTH} characters, one has {len(text)}"
    if params.logprobs is not None and not 0 <= params.logprobs <= MAX_LOGPROBS:
        yield "logprobs", f"must be between 0 and {MAX_LOGPROBS}, is {params.logprobs}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One accepted prompt. From `Engine.submit` on, the engine owns its lease.

    Attributes:
        request_id: unique among the requests in the engine.
        prompt_token_ids: at least one token.
        sampling: how tokens are chosen.
        lease: the adapter version that answers; None for the plain base.
        deadline_seconds: on the engine's monotonic clock; None for none.
        arrival_seconds: on the engine's monotonic clock.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    lease: Lease | None = None
    deadline_seconds: float | None = None
    arrival_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise InvalidRequestError([("prompt", "must have at least one token")])


class FinishReason(Enum):
    """Why a request is complete: a stop string or token, its length or the context's end, the model's end token."""

    STOP = "stop"
    LENGTH = "length"
    EOS = "eos"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Log probabilities at one position, of the model's own distribution: before temperature, top_k and top_p.

    Attributes:
        token_id: the token that was chosen.
        logprob: its natural log probability.
        top: (token id, log probability) of the most probable tokens, best first, ties to the lower id.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken:
    """What the runner chose for one sequence of a step.

    Attributes:
        token_id: the token; meaningless if `is_finite` is false.
        logprob: its log probability as in `TokenLogprob`; None if not asked for.
        top: the most probable tokens as in `TokenLogprob`.
        is_finite: false if the logits held NaN or infinity, so that nothing could be chosen.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    is_finite: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """How a request ended well.

    Attributes:
        reason: why.
        num_prompt_tokens: tokens of the prompt.
        num_generated_tokens: tokens generated, the one that ended it included.
        stop_string: the string that matched, if one did.
        stop_token_id: the token that ended it, if one did.
        ttft_seconds: from arrival to the first token.
        queue_seconds: from arrival to the first step that ran it.
    """

    reason: FinishReason
    num_prompt_tokens: int
    num_generated_tokens: int
    stop_string: str | None = None
    stop_token_id: int | None = None
    ttft_seconds: float = 0.0
    queue_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """What one engine step brought for one request; the last of a request has `finish` or `error`, never both.

    Attributes:
        request_id: whose output this is.
        text: whole characters that are decided, to be appended to what came before; may be empty.
        token_ids: tokens of this step; their text may come with a later output.
        logprobs: one per token of `token_ids` where asked for, else empty.
        finish: set on the last output of a request that ended well.
        error: set on the last output of a request that did not.
    """

    request_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    error: Exception | None = None

    @property
    def is_terminal(self) -> bool:
        """Whether nothing follows for this request."""
        return self.finish is not None or self.error is not None
