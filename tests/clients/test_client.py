"""The synchronous client against a fake server over real gRPC."""

import threading
import time
from datetime import UTC, datetime

import grpc
import pytest
from google.rpc import error_details_pb2
from lorasrv_client import Client, Stream, errors
from lorasrv_client.types import AdapterKind, AdapterState, Chunk, FinishReason, HealthStatus, TokenLogprob, Usage


@pytest.fixture
def client(server):
    with Client(server.target) as connected:
        yield connected


@pytest.fixture
def single(server):
    """A client that never tries again."""
    with Client(server.target, retry=False) as connected:
        yield connected


def test_generate_returns_every_field_of_the_answer(client, server):
    answer = client.generate("The sea", max_new_tokens=5, seed=7, logprobs=1)
    assert answer.text == " one two three för "
    assert answer.token_ids == (0, 1, 2, 3, 4)
    assert answer.finish_reason is FinishReason.LENGTH
    assert answer.usage == Usage(prompt_tokens=5, generated_tokens=5)
    assert answer.logprobs == (TokenLogprob(token_id=4, logprob=-0.25, top=((4, -0.25),)),)
    assert (answer.seed, answer.adapter_digest, answer.stop_string, answer.stop_token_id) == (7, "", None, None)
    assert answer.timings.time_to_first_token_seconds == 0.5
    assert server.requests[0].prompt == "The sea"


def test_options_that_are_not_given_are_not_sent(client, server):
    client.generate("", temperature=0.0, top_k=None)
    request = server.requests[0]
    assert sorted(field.name for field, _ in request.ListFields()) == ["prompt", "temperature"]
    assert request.temperature == 0.0


def test_all_options_arrive(client, server):
    client.generate(
        [3, 4],
        temperature=0.5,
        top_k=9,
        top_p=0.75,
        seed=2**63,
        stop=["\n", "END"],
        stop_token_ids=(1, 2),
        ignore_eos=False,
        logprobs=0,
        max_new_tokens=1,
    )
    request = server.requests[0]
    assert not request.HasField("prompt")
    assert list(request.token_ids) == [3, 4]
    assert (request.temperature, request.top_k, request.top_p, request.seed) == (0.5, 9, 0.75, 2**63)
    assert (list(request.stop), list(request.stop_token_ids)) == (["\n", "END"], [1, 2])
    assert request.HasField("ignore_eos")
    assert request.HasField("logprobs")


def test_an_option_that_does_not_exist_is_refused_before_any_call(client, server):
    with pytest.raises(TypeError, match="temprature"):
        client.generate("x", temprature=1.0)
    assert server.requests == []


def test_stream_gives_chunks_and_then_the_same_answer_as_generate(client):
    client.load_adapter("lora", "/x")
    with client.stream("The sea", adapter_id="lora", max_new_tokens=4, seed=3) as stream:
        chunks = list(stream)
        assert stream.result() == client.generate("The sea", adapter_id="lora", max_new_tokens=4, seed=3)
    assert chunks[1] == Chunk(text="one ", token_ids=(1,))


def test_result_reads_what_is_left_of_the_stream(client):
    stream = client.stream("x", max_new_tokens=3)
    first = next(iter(stream))
    assert stream.result().text.startswith(first.text)
    assert stream.result().token_ids == (0, 1, 2)


def test_leaving_a_stream_early_cancels_it_in_the_server(client, server):
    server.hold.clear()
    with client.stream("x", max_new_tokens=5) as stream:
        next(iter(stream))
    assert server.cancelled.wait(5)


def test_adapters_come_and_go(client, server):
    loaded = client.load_adapter("dora", "/models/d", replace=True, expected_digest="ab" * 6)
    assert (server.requests[0].replace, server.requests[0].expected_digest) == (True, "ab" * 6)
    assert loaded.kind is AdapterKind.DORA
    assert loaded.state is AdapterState.READY
    assert loaded.load_time == datetime.fromtimestamp(1_700_000_000, tz=UTC)
    assert client.get_adapter("dora") == loaded
    assert client.unload_adapter("dora", if_idle=True).state is AdapterState.UNLOADED
    assert server.requests[-1].mode == 2
    with pytest.raises(errors.AdapterNotFoundError, match="'dora' is not loaded"):
        client.get_adapter("dora")


def test_list_adapters_reads_every_page(client, server):
    for name in "edcba":
        client.load_adapter(name, "/x")
    assert [adapter.adapter_id for adapter in client.list_adapters(page_size=2)] == list("abcde")
    assert [request.page_token for request in server.requests[5:]] == ["", "2", "4"]


def test_server_info_and_health(client, server, fake):
    info = client.server_info()
    assert (info.version, info.limits.max_rank, info.sampling_defaults.top_p) == ("9.9", 64, 1.0)
    assert info.features == ("stream",)
    assert client.health("ready") is HealthStatus.SERVING
    server.health.set("ready", fake.health_pb2.HealthCheckResponse.NOT_SERVING)
    assert client.health("ready") is HealthStatus.NOT_SERVING
    with pytest.raises(errors.NotFoundError):
        client.health("nonsense")


CODE = grpc.StatusCode
MAPPING = [
    (CODE.INVALID_ARGUMENT, "INVALID_REQUEST", errors.InvalidArgumentError),
    (CODE.INVALID_ARGUMENT, "PROMPT_TOO_LONG", errors.PromptTooLongError),
    (CODE.INVALID_ARGUMENT, "REQUEST_TOO_LARGE", errors.PromptTooLongError),
    (CODE.NOT_FOUND, "ADAPTER_NOT_FOUND", errors.AdapterNotFoundError),
    (CODE.NOT_FOUND, "HUB_NOT_FOUND", errors.NotFoundError),
    (CODE.ALREADY_EXISTS, "ADAPTER_EXISTS", errors.AdapterExistsError),
    (CODE.FAILED_PRECONDITION, "ADAPTER_INVALID", errors.AdapterInvalidError),
    (CODE.FAILED_PRECONDITION, "ADAPTER_IN_USE", errors.AdapterInUseError),
    (CODE.FAILED_PRECONDITION, "SOMETHING_NEW", errors.ServerError),
    (CODE.DATA_LOSS, "ADAPTER_CORRUPT", errors.AdapterCorruptError),
    (CODE.RESOURCE_EXHAUSTED, "QUEUE_FULL", errors.OverloadedError),
    (CODE.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", errors.OutOfResourcesError),
    (CODE.RESOURCE_EXHAUSTED, "ADAPTER_SLOTS_FULL", errors.OutOfResourcesError),
    (CODE.UNAVAILABLE, "DRAINING", errors.UnavailableError),
    (CODE.UNAUTHENTICATED, "", errors.AuthenticationError),
    (CODE.PERMISSION_DENIED, "HUB_ACCESS_DENIED", errors.PermissionDeniedError),
    (CODE.DEADLINE_EXCEEDED, "", errors.DeadlineExceededError),
    (CODE.CANCELLED, "", errors.CancelledError),
    (CODE.INTERNAL, "INTERNAL", errors.ServerError),
]


@pytest.mark.parametrize(("code", "reason", "kind"), MAPPING, ids=lambda value: getattr(value, "__name__", str(value)))
def test_every_reason_has_its_error(single, server, fake, code, reason, kind):
    server.refusals.append(fake.Refusal(code, "the text", reason))
    with pytest.raises(errors.ClientError, match="the text") as caught:
        single.generate("x")
    assert type(caught.value) is kind
    assert (caught.value.code, caught.value.reason) == (code, reason)


def test_errors_carry_what_the_server_says(single, server, fake):
    bad = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field="top_p", description="must be above 0"),
            error_details_pb2.BadRequest.FieldViolation(field="stop", description="must not be empty"),
        ]
    )
    failed = error_details_pb2.PreconditionFailure(
        violations=[error_details_pb2.PreconditionFailure.Violation(description="rank 300")]
    )
    server.refusals = [
        fake.Refusal(CODE.INVALID_ARGUMENT, "2 fields", "INVALID_REQUEST", bad, metadata={"limit": "5"}),
        fake.Refusal(CODE.FAILED_PRECONDITION, "no", "ADAPTER_INVALID", failed),
        fake.Refusal(CODE.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL", fake.retry_info(1.5)),
        fake.Refusal(CODE.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL"),
    ]
    with pytest.raises(errors.InvalidArgumentError) as invalid:
        single.generate("x")
    assert invalid.value.violations == (("top_p", "must be above 0"), ("stop", "must not be empty"))
    assert invalid.value.metadata == {"limit": "5"}
    with pytest.raises(errors.AdapterInvalidError) as refused:
        single.load_adapter("a", "/x")
    assert refused.value.reasons == ("rank 300",)
    with pytest.raises(errors.OverloadedError) as overloaded:
        list(single.stream("x"))
    assert overloaded.value.retry_after_seconds == 1.5
    with pytest.raises(errors.OverloadedError) as silent:
        single.generate("x")
    assert silent.value.retry_after_seconds is None


def test_a_refusal_without_details_still_has_its_error(single, server):
    class Bare:
        def abort(self, context):
            context.abort(CODE.UNAVAILABLE, "a proxy says no")

    server.refusals.append(Bare())
    with pytest.raises(errors.UnavailableError, match="a proxy says no") as caught:
        single.generate("x")
    assert caught.value.reason == ""


def test_retries_wait_as_long_as_the_server_asks(client, server, fake):
    server.refusals = [fake.Refusal(CODE.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL", pushback_ms=40)] * 2
    began = time.monotonic()
    assert client.generate("x").token_ids
    # the policy's own waits would be 0.16 s and more, each
    assert 0.08 <= time.monotonic() - began < 0.3
    assert len(server.requests) == 3


def test_a_negative_pushback_ends_the_attempts(client, server, fake):
    server.refusals = [fake.Refusal(CODE.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL", pushback_ms=-1)] * 4
    with pytest.raises(errors.OverloadedError):
        client.generate("x")
    assert len(server.requests) == 1


def test_wrong_arguments_are_not_tried_again(client, server, fake):
    server.refusals.append(fake.Refusal(CODE.INVALID_ARGUMENT, "no", "INVALID_REQUEST"))
    with pytest.raises(errors.InvalidArgumentError):
        client.generate("x")
    assert len(server.requests) == 1


def test_timeout_ends_the_wait(client, server):
    server.hold.clear()
    with pytest.raises(errors.DeadlineExceededError):
        client.stream("x", max_new_tokens=5, timeout_seconds=0.2).result()


def test_no_server_is_unavailable():
    with Client("127.0.0.1:1", retry=False) as client, pytest.raises(errors.UnavailableError):
        client.server_info(timeout_seconds=5)


def test_a_stream_without_a_finish_is_an_error():
    class Truncated:
        def __iter__(self):
            return iter(())

        def cancel(self):
            pass

    stream = Stream(Truncated())
    with pytest.raises(errors.ServerError, match="without a finish"):
        stream.result()


def test_threads_may_share_a_client(client):
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(client.generate("x").text)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(answers) == 8
