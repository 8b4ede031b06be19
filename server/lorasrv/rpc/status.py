"""Errors to gRPC statuses: one table, used at the edge of every service.

Each status is a `google.rpc.Status` with an ErrorInfo of domain "lorasrv"; errors that trying again can cure also tell
when, in a RetryInfo and in the metadata that gRPC clients obey by themselves. Whatever the table does not name is a
bug: the client gets an opaque id and the log gets the trace beside it. Knows no service.
"""

import logging
import math
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from lorasrv_adapters import errors as adapter_errors

from lorasrv import errors

DOMAIN = "lorasrv"
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"

# clients accept 8 KiB of metadata by default; the binary details travel in base64, beside the message
_MAX_MESSAGE_CHARACTERS = 600
_MAX_LISTED_BYTES = 3000
_MAX_VALUE_CHARACTERS = 160

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RpcStatus:
    """A status as it goes onto the wire.

    Attributes:
        code: the gRPC code.
        message: for people.
        trailing_metadata: the details, and when to try again.
    """

    code: grpc.StatusCode
    message: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """How one type of error travels.

    Attributes:
        code: the gRPC code.
        fields: the error's attributes that go into the ErrorInfo's metadata.
        details: makes one more detail message from the error.
        retry_after_seconds: when to try again, where the error itself does not say; None for an error that stays.
    """

    code: grpc.StatusCode
    fields: tuple[str, ...] = ()
    details: Callable[[Exception], Message] | None = None
    retry_after_seconds: float | None = None


def status_of(error: Exception) -> RpcStatus:
    """Returns the status an error travels under; an error the table does not name is logged with its trace."""
    rule = next((_RULES[kind] for kind in type(error).__mro__ if kind in _RULES), None)
    if rule is None:
        return _internal(error)
    details: list[Message] = []
    if rule.details is not None:
        details.append(rule.details(error))
    retry_after_seconds = getattr(error, "retry_after_seconds", rule.retry_after_seconds)
    if retry_after_seconds is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=_duration(retry_after_seconds)))
    return _status(
        rule.code,
        message=str(error),
        reason=getattr(error, "reason", "INTERNAL"),
        metadata={field: _value(getattr(error, field)) for field in rule.fields},
        details=details,
        retry_after_seconds=retry_after_seconds,
    )


def _internal(error: Exception) -> RpcStatus:
    error_id = uuid.uuid4().hex
    _log.error("internal error", exc_info=error, extra={"error_id": error_id})
    return _status(
        grpc.StatusCode.INTERNAL,
        message=f"internal error {error_id}",
        reason="INTERNAL",
        metadata={"error_id": error_id},
    )


def _status(
    code: grpc.StatusCode,
    *,
    message: str,
    reason: str,
    metadata: dict[str, str],
    details: Iterable[Message] = (),
    retry_after_seconds: float | None = None,
) -> RpcStatus:
    message = _shorten(message, _MAX_MESSAGE_CHARACTERS)
    status = status_pb2.Status(code=code.value[0], message=message)
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)
    for detail in (info, *details):
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    trailing: list[tuple[str, str | bytes]] = [(DETAILS_KEY, status.SerializeToString())]
    if retry_after_seconds is not None:
        trailing.append((PUSHBACK_KEY, str(math.ceil(retry_after_seconds * 1000))))
    return RpcStatus(code=code, message=message, trailing_metadata=tuple(trailing))


def _bad_request(error: Exception) -> Message:
    assert isinstance(error, errors.InvalidRequestError)
    listed = _within_budget([(field, _shorten(text, _MAX_VALUE_CHARACTERS)) for field, text in error.violations])
    violations = [error_details_pb2.BadRequest.FieldViolation(field=field, description=text) for field, text in listed]
    detail: Message = error_details_pb2.BadRequest(field_violations=violations)
    return detail


def _bad_adapter_id(error: Exception) -> Message:
    assert isinstance(error, adapter_errors.InvalidAdapterIdError)
    violation = error_details_pb2.BadRequest.FieldViolation(field="adapter_id", description=error.rule)
    detail: Message = error_details_pb2.BadRequest(field_violations=[violation])
    return detail


def _failed_preconditions(error: Exception) -> Message:
    assert isinstance(error, adapter_errors.AdapterIncompatibleError)
    listed = _within_budget([("adapter", _shorten(text, _MAX_VALUE_CHARACTERS)) for text in error.reasons])
    detail: Message = error_details_pb2.PreconditionFailure(
        violations=[
            error_details_pb2.PreconditionFailure.Violation(type=error.reason, subject=subject, description=text)
            for subject, text in listed
        ]
    )
    return detail


def _missing_adapter(error: Exception) -> Message:
    assert isinstance(error, adapter_errors.AdapterNotFoundError)
    detail: Message = error_details_pb2.ResourceInfo(
        resource_type="lorasrv.v1.Adapter", resource_name=_value(error.adapter_id), description="is not loaded"
    )
    return detail


def _missing_source(error: Exception) -> Message:
    assert isinstance(error, adapter_errors.AdapterSourceError)
    detail: Message = error_details_pb2.ResourceInfo(
        resource_type="lorasrv.v1.AdapterSource", resource_name=_value(error.source), description="does not exist"
    )
    return detail


def _within_budget(entries: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Returns the entries that fit, and one that counts those that do not."""
    shown: list[tuple[str, str]] = []
    num_bytes = 0
    for name, text in entries:
        num_bytes += len(name.encode()) + len(text.encode()) + 16
        if num_bytes > _MAX_LISTED_BYTES:
            return [*shown, (name, f"and {len(entries) - len(shown)} more")]
        shown.append((name, text))
    return shown


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromMilliseconds(math.ceil(seconds * 1000))
    return duration


def _value(value: object) -> str:
    return _shorten(str(value), _MAX_VALUE_CHARACTERS)


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


# the most specific type of an error decides
_RULES: dict[type[Exception], _Rule] = {
    errors.InvalidRequestError: _Rule(code=grpc.StatusCode.INVALID_ARGUMENT, details=_bad_request),
    errors.PromptTooLongError: _Rule(
        code=grpc.StatusCode.INVALID_ARGUMENT,
        fields=("num_prompt_tokens", "max_new_tokens", "limit_tokens"),
        details=_bad_request,
    ),
    errors.RequestTooLargeError: _Rule(
        code=grpc.StatusCode.INVALID_ARGUMENT, fields=("needed", "limit", "unit"), details=_bad_request
    ),
    errors.RequestCancelledError: _Rule(code=grpc.StatusCode.CANCELLED, fields=("phase",)),
    errors.DeadlineExceededError: _Rule(code=grpc.StatusCode.DEADLINE_EXCEEDED, fields=("phase",)),
    errors.QueueTimeoutError: _Rule(code=grpc.StatusCode.RESOURCE_EXHAUSTED, fields=("waited_seconds",)),
    errors.SlowReaderError: _Rule(code=grpc.StatusCode.RESOURCE_EXHAUSTED, fields=("limit",)),
    errors.NonFiniteOutputError: _Rule(code=grpc.StatusCode.INTERNAL, fields=("adapter_id", "position")),
    errors.EngineStepError: _Rule(code=grpc.StatusCode.INTERNAL, fields=("error_id",)),
    errors.QueueFullError: _Rule(code=grpc.StatusCode.RESOURCE_EXHAUSTED, fields=("capacity",)),
    errors.DrainingError: _Rule(code=grpc.StatusCode.UNAVAILABLE),
    errors.EngineDownError: _Rule(code=grpc.StatusCode.UNAVAILABLE),
    adapter_errors.InvalidAdapterIdError: _Rule(code=grpc.StatusCode.INVALID_ARGUMENT, details=_bad_adapter_id),
    adapter_errors.AdapterNotFoundError: _Rule(
        code=grpc.StatusCode.NOT_FOUND, fields=("adapter_id",), details=_missing_adapter
    ),
    adapter_errors.AdapterExistsError: _Rule(
        code=grpc.StatusCode.ALREADY_EXISTS, fields=("adapter_id", "served_digest", "new_digest")
    ),
    adapter_errors.AdapterInUseError: _Rule(
        code=grpc.StatusCode.FAILED_PRECONDITION, fields=("adapter_id", "num_in_use")
    ),
    adapter_errors.AdapterIncompatibleError: _Rule(
        code=grpc.StatusCode.FAILED_PRECONDITION, details=_failed_preconditions
    ),
    adapter_errors.AdapterCorruptError: _Rule(code=grpc.StatusCode.DATA_LOSS),
    # it can never fit, so that waiting does not help
    adapter_errors.SlotsExhaustedError: _Rule(
        code=grpc.StatusCode.RESOURCE_EXHAUSTED, fields=("num_bytes", "limit_bytes")
    ),
    adapter_errors.SourceNotAllowedError: _Rule(code=grpc.StatusCode.PERMISSION_DENIED, fields=("source",)),
    adapter_errors.SourceNotFoundError: _Rule(
        code=grpc.StatusCode.NOT_FOUND, fields=("source",), details=_missing_source
    ),
    adapter_errors.HubUnreachableError: _Rule(
        code=grpc.StatusCode.UNAVAILABLE, fields=("source",), retry_after_seconds=5.0
    ),
    adapter_errors.HubAccessDeniedError: _Rule(code=grpc.StatusCode.PERMISSION_DENIED, fields=("source",)),
}
