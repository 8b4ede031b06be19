"""Every error's code, reason and details; what no client may see."""

from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from lorasrv import errors
from lorasrv.rpc.status import RpcStatus, status_of
from lorasrv_adapters import errors as adapter_errors

Code = grpc.StatusCode

TABLE = [
    (errors.InvalidRequestError([("stop", "is empty")]), Code.INVALID_ARGUMENT, "INVALID_REQUEST", {}),
    (
        errors.PromptTooLongError(num_prompt_tokens=60, max_new_tokens=10, limit_tokens=64),
        Code.INVALID_ARGUMENT,
        "PROMPT_TOO_LONG",
        {"num_prompt_tokens": "60", "max_new_tokens": "10", "limit_tokens": "64"},
    ),
    (
        errors.RequestTooLargeError(needed=9, limit=8, unit="KV blocks"),
        Code.INVALID_ARGUMENT,
        "REQUEST_TOO_LARGE",
        {"needed": "9", "limit": "8", "unit": "KV blocks"},
    ),
    (errors.RequestCancelledError("queued"), Code.CANCELLED, "CANCELLED", {"phase": "queued"}),
    (errors.DeadlineExceededError("running"), Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", {"phase": "running"}),
    (
        errors.QueueTimeoutError(waited_seconds=2.0, retry_after_seconds=1.5),
        Code.RESOURCE_EXHAUSTED,
        "QUEUE_TIMEOUT",
        {"waited_seconds": "2.0"},
    ),
    (errors.SlowReaderError(limit=7), Code.RESOURCE_EXHAUSTED, "SLOW_READER", {"limit": "7"}),
    (
        errors.NonFiniteOutputError(adapter_id="a", position=3),
        Code.INTERNAL,
        "NON_FINITE_OUTPUT",
        {"adapter_id": "a", "position": "3"},
    ),
    (errors.EngineStepError("f00d"), Code.INTERNAL, "INTERNAL", {"error_id": "f00d"}),
    (
        errors.QueueFullError(capacity=4, retry_after_seconds=0.5),
        Code.RESOURCE_EXHAUSTED,
        "QUEUE_FULL",
        {"capacity": "4"},
    ),
    (errors.DrainingError(), Code.UNAVAILABLE, "DRAINING", {}),
    (errors.EngineDownError(), Code.UNAVAILABLE, "ENGINE_DOWN", {}),
    (adapter_errors.InvalidAdapterIdError("a b", "no spaces"), Code.INVALID_ARGUMENT, "INVALID_REQUEST", {}),
    (adapter_errors.AdapterNotFoundError("a"), Code.NOT_FOUND, "ADAPTER_NOT_FOUND", {"adapter_id": "a"}),
    (
        adapter_errors.AdapterExistsError("a", served_digest="0" * 64, new_digest="1" * 64),
        Code.ALREADY_EXISTS,
        "ADAPTER_EXISTS",
        {"adapter_id": "a", "served_digest": "0" * 64, "new_digest": "1" * 64},
    ),
    (
        adapter_errors.AdapterInUseError("a", num_in_use=2),
        Code.FAILED_PRECONDITION,
        "ADAPTER_IN_USE",
        {"adapter_id": "a", "num_in_use": "2"},
    ),
    (adapter_errors.AdapterIncompatibleError(["rank 0"]), Code.FAILED_PRECONDITION, "ADAPTER_INVALID", {}),
    (adapter_errors.AdapterCorruptError(["truncated"]), Code.DATA_LOSS, "ADAPTER_CORRUPT", {}),
    (
        adapter_errors.SlotsExhaustedError(num_bytes=9, limit_bytes=8),
        Code.RESOURCE_EXHAUSTED,
        "ADAPTER_SLOTS_FULL",
        {"num_bytes": "9", "limit_bytes": "8"},
    ),
    (
        adapter_errors.SourceNotAllowedError("/etc", "outside"),
        Code.PERMISSION_DENIED,
        "SOURCE_NOT_ALLOWED",
        {"source": "/etc"},
    ),
    (adapter_errors.SourceNotFoundError("x", "nothing"), Code.NOT_FOUND, "SOURCE_NOT_FOUND", {"source": "x"}),
    (adapter_errors.HubUnreachableError("hf:a/b", "down"), Code.UNAVAILABLE, "HUB_UNREACHABLE", {"source": "hf:a/b"}),
    (
        adapter_errors.HubAccessDeniedError("hf:a/b", "no"),
        Code.PERMISSION_DENIED,
        "HUB_ACCESS_DENIED",
        {"source": "hf:a/b"},
    ),
]
RETRYABLE = {"QUEUE_TIMEOUT", "QUEUE_FULL", "DRAINING", "ENGINE_DOWN", "HUB_UNREACHABLE"}
DETAILS = {
    "INVALID_REQUEST": error_details_pb2.BadRequest,
    "PROMPT_TOO_LONG": error_details_pb2.BadRequest,
    "REQUEST_TOO_LARGE": error_details_pb2.BadRequest,
    "ADAPTER_NOT_FOUND": error_details_pb2.ResourceInfo,
    "SOURCE_NOT_FOUND": error_details_pb2.ResourceInfo,
    "ADAPTER_INVALID": error_details_pb2.PreconditionFailure,
}


def _unpacked(status: RpcStatus) -> list[object]:
    rich = status_pb2.Status.FromString(dict(status.trailing_metadata)["grpc-status-details-bin"])
    assert (rich.code, rich.message) == (status.code.value[0], status.message)
    kinds = [error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo, *set(DETAILS.values())]
    found = []
    for packed in rich.details:
        (kind,) = (kind for kind in kinds if packed.Is(kind.DESCRIPTOR))
        found.append(kind())
        packed.Unpack(found[-1])
    return found


@pytest.mark.parametrize(
    ("error", "code", "reason", "metadata"), TABLE, ids=[type(error).__name__ for error, *_ in TABLE]
)
def test_code_reason_and_details(error: Exception, code: Code, reason: str, metadata: dict[str, str]) -> None:
    status = status_of(error)
    info, *details = _unpacked(status)
    assert (status.code, info.reason, info.domain, dict(info.metadata)) == (code, reason, "lorasrv", metadata)
    expected = [DETAILS[reason]] if reason in DETAILS else []
    if reason in RETRYABLE:
        expected.append(error_details_pb2.RetryInfo)
        pushback = int(dict(status.trailing_metadata)["grpc-retry-pushback-ms"])
        assert details[-1].retry_delay.ToMilliseconds() == pushback > 0
    else:
        assert "grpc-retry-pushback-ms" not in dict(status.trailing_metadata)
    assert [type(detail) for detail in details] == expected


def test_no_error_that_a_call_can_raise_is_missing_from_the_table() -> None:
    bases = {errors.RequestEndedError, errors.ReasonsError, adapter_errors.AdapterSourceError}
    of_commands_only = {
        errors.ConfigError,
        errors.ModelLoadError,
        errors.DiskFullError,
        errors.TrainingDataError,
        errors.MergeError,
        errors.MergeRefusedError,
        errors.MergeVerificationError,
        errors.NonFiniteLossError,
        adapter_errors.AdapterConversionError,
    }
    known = {*_subclasses(errors.LorasrvError), *_subclasses(adapter_errors.AdapterError)} - bases - of_commands_only
    assert {kind for kind in known if not kind.__name__.startswith("_")} == {type(error) for error, *_ in TABLE}


def _subclasses(kind: type[Exception]) -> Iterator[type[Exception]]:
    for child in kind.__subclasses__():
        # those of this test's neighbours are not ours
        if child.__module__ in (errors.__name__, adapter_errors.__name__):
            yield child
            yield from _subclasses(child)


@pytest.mark.parametrize("error", [KeyError("/secret"), errors.ConfigError(["/secret"]), OSError(2, "no", "/secret")])
def test_what_is_not_in_the_table_is_internal_and_opaque(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    status = status_of(error)
    (info,) = _unpacked(status)
    assert (status.code, info.reason) == (Code.INTERNAL, "INTERNAL")
    assert "secret" not in repr(status)
    (record,) = caplog.records
    assert record.error_id == info.metadata["error_id"]
    assert record.exc_info is not None
    assert record.exc_info[1] is error


def test_a_long_list_is_cut_so_that_clients_accept_the_metadata() -> None:
    reasons = [f"tensor {number} {'x' * 400}" for number in range(5000)]
    for error in (
        adapter_errors.AdapterIncompatibleError(reasons),
        errors.InvalidRequestError([("stop" * 100, reason) for reason in reasons]),
        adapter_errors.AdapterNotFoundError("a" * 100_000),
    ):
        status = status_of(error)
        details = dict(status.trailing_metadata)["grpc-status-details-bin"]
        assert len(details) * 4 / 3 + len(status.message) < 7500
    _, failure = _unpacked(status_of(adapter_errors.AdapterIncompatibleError(reasons)))
    texts = [violation.description for violation in failure.violations]
    assert texts[0].startswith("tensor 0 ")
    assert texts[-1] == f"and {5000 - (len(texts) - 1)} more"


def test_all_of_a_short_list_is_told() -> None:
    _, failure = _unpacked(status_of(adapter_errors.AdapterIncompatibleError(["one", "two"])))
    assert [(v.type, v.description) for v in failure.violations] == [
        ("ADAPTER_INVALID", "one"),
        ("ADAPTER_INVALID", "two"),
    ]
