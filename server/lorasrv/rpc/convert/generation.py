"""Generation: requests into checked calls, outputs into answers.

Every check that needs nothing but the message happens here, and one error lists all that is wrong with it. The module
tokenizes nothing, looks up no adapter, and does not know the call a message came with.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lorasrv_proto.v1 import generation_pb2

from lorasrv.engine.request import FinishReason, RequestOutput, SamplingParams
from lorasrv.engine.request import TokenLogprob as EngineLogprob
from lorasrv.errors import InvalidRequestError, PromptTooLongError
from lorasrv.rpc.convert.adapter_ids import reference_violations

MAX_STOP_TOKEN_IDS = 64
ROUTING_KEY = "x-lorasrv-adapter"
"""Metadata that may repeat adapter_id, so that routers need not open the message."""

_FINISH_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    FinishReason.EOS: generation_pb2.FINISH_REASON_EOS,
}

Violations = Iterator[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """What the model allows a request.

    Attributes:
        max_model_len: most tokens of prompt and answer together.
        vocab_size: token ids are below it.
    """

    max_model_len: int
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationCall:
    """A checked generation request, not yet tokenized.

    Attributes:
        adapter: "id" or "id@digest-prefix"; empty for the plain base.
        prompt: text to tokenize, or token ids to use as they are.
        sampling: how tokens are chosen; its seed is final.
        caps_to_context: max_new_tokens is the server's default, so it gives way where the context ends earlier.
    """

    adapter: str
    prompt: str | tuple[int, ...]
    sampling: SamplingParams
    caps_to_context: bool

    def fit(self, num_prompt_tokens: int, *, limits: RequestLimits) -> SamplingParams:
        """Returns the sampling parameters for a prompt of this length.

        Raises:
            InvalidRequestError: there is no token.
            PromptTooLongError: prompt and new tokens pass the context.
        """
        if num_prompt_tokens < 1:
            raise InvalidRequestError([("prompt", "must have at least one token")])
        room = limits.max_model_len - num_prompt_tokens
        wanted = self.sampling.max_new_tokens
        if room < 1 or (wanted > room and not self.caps_to_context):
            raise PromptTooLongError(
                num_prompt_tokens=num_prompt_tokens,
                max_new_tokens=1 if self.caps_to_context else wanted,
                limit_tokens=limits.max_model_len,
            )
        return replace(self.sampling, max_new_tokens=min(wanted, room))


def generation_call(
    message: generation_pb2.GenerateRequest,
    *,
    limits: RequestLimits,
    defaults: SamplingParams,
    seed: int,
    routed_adapter: str | None = None,
    prefix: str = "",
) -> GenerationCall:
    """Checks a generation request and fills in what it leaves to the server.

    Args:
        message: the request.
        limits: what the model allows.
        defaults: the server's values of fields that are not set, except the seed.
        seed: the seed of a request that has none.
        routed_adapter: the adapter that the call's metadata names for routers, if it does; it must be the same.
        prefix: path of `message` in what the client sent, e.g. "request.".

    Raises:
        InvalidRequestError: with every violated field.
    """
    violations = [*reference_violations(message.adapter_id), *_token_violations(message, limits)]
    if routed_adapter is not None and routed_adapter != message.adapter_id:
        violations.append(("adapter_id", f"differs from the call's metadata {ROUTING_KEY}"))
    sampling = defaults
    try:
        sampling = _sampling(message, defaults, seed)
    except InvalidRequestError as error:
        violations.extend(error.violations)
    if violations:
        raise InvalidRequestError([(prefix + field, text) for field, text in violations])
    return GenerationCall(
        adapter=message.adapter_id,
        prompt=message.prompt if message.HasField("prompt") else tuple(message.token_ids),
        sampling=sampling,
        caps_to_context=not message.HasField("max_new_tokens"),
    )


def stream_request(message: generation_pb2.GenerateStreamRequest) -> generation_pb2.GenerateRequest:
    """Returns the request to stream.

    Raises:
        InvalidRequestError: there is none.
    """
    if not message.HasField("request"):
        raise InvalidRequestError([("request", "must be set")])
    return message.request


def generate_response(output: RequestOutput, *, adapter_digest: str, seed: int) -> generation_pb2.GenerateResponse:
    """Returns a whole answer; `output` is all of its outputs merged, the last with a finish."""
    end = generate_finish(output, adapter_digest=adapter_digest, seed=seed)
    response = generation_pb2.GenerateResponse(
        text=output.text,
        token_ids=output.token_ids,
        finish_reason=end.finish_reason,
        usage=end.usage,
        adapter_digest=end.adapter_digest,
        logprobs=[_token_logprob(logprob) for logprob in output.logprobs],
        timings=end.timings,
        seed=end.seed,
    )
    if end.HasField("stop_string"):
        response.stop_string = end.stop_string
    if end.HasField("stop_token_id"):
        response.stop_token_id = end.stop_token_id
    return response


def generate_chunk(output: RequestOutput) -> generation_pb2.GenerateChunk:
    """Returns one piece of an answer."""
    return generation_pb2.GenerateChunk(
        text=output.text,
        token_ids=output.token_ids,
        logprobs=[_token_logprob(logprob) for logprob in output.logprobs],
    )


def generate_finish(output: RequestOutput, *, adapter_digest: str, seed: int) -> generation_pb2.GenerateFinish:
    """Returns the end of an answer, from its last output."""
    finish = output.finish
    assert finish is not None
    return generation_pb2.GenerateFinish(
        finish_reason=_FINISH_REASONS[finish.reason],
        usage=generation_pb2.Usage(
            prompt_tokens=finish.num_prompt_tokens, generated_tokens=finish.num_generated_tokens
        ),
        adapter_digest=adapter_digest,
        timings=generation_pb2.Timings(
            queue_seconds=finish.queue_seconds, time_to_first_token_seconds=finish.ttft_seconds
        ),
        seed=seed,
        stop_string=finish.stop_string,
        stop_token_id=finish.stop_token_id,
    )


def _token_logprob(logprob: EngineLogprob) -> generation_pb2.TokenLogprob:
    return generation_pb2.TokenLogprob(
        token_id=logprob.token_id,
        logprob=logprob.logprob,
        top=[generation_pb2.TopLogprob(token_id=token_id, logprob=value) for token_id, value in logprob.top],
    )


def _sampling(message: generation_pb2.GenerateRequest, defaults: SamplingParams, seed: int) -> SamplingParams:
    is_set = message.HasField
    return SamplingParams(
        max_new_tokens=message.max_new_tokens if is_set("max_new_tokens") else defaults.max_new_tokens,
        temperature=message.temperature if is_set("temperature") else defaults.temperature,
        top_k=message.top_k if is_set("top_k") else defaults.top_k,
        top_p=message.top_p if is_set("top_p") else defaults.top_p,
        seed=message.seed if is_set("seed") else seed,
        stop=tuple(message.stop) or defaults.stop,
        stop_token_ids=tuple(message.stop_token_ids) or defaults.stop_token_ids,
        ignore_eos=message.ignore_eos if is_set("ignore_eos") else defaults.ignore_eos,
        logprobs=message.logprobs if is_set("logprobs") else defaults.logprobs,
    )


def _token_violations(message: generation_pb2.GenerateRequest, limits: RequestLimits) -> Violations:
    if message.HasField("prompt") and message.token_ids:
        yield "token_ids", "prompt and token_ids are both given; give one of them"
    if not message.HasField("prompt") and not message.token_ids:
        yield "prompt", "neither prompt nor token_ids is given; give one of them"
    if len(message.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        yield "stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS} tokens, are {len(message.stop_token_ids)}"
    for field, token_ids in (("token_ids", message.token_ids), ("stop_token_ids", message.stop_token_ids)):
        wrong = next((index for index, token in enumerate(token_ids) if token >= limits.vocab_size), None)
        if wrong is not None:
            yield f"{field}[{wrong}]", f"must be below the vocabulary size {limits.vocab_size}, is {token_ids[wrong]}"
