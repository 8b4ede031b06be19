"""What can go wrong with a call, by the reason the server gives.

    ClientError                          code, reason, metadata
    |-- InvalidArgumentError             INVALID_REQUEST        violations, every field that is wrong
    |   `-- PromptTooLongError           PROMPT_TOO_LONG, REQUEST_TOO_LARGE
    |-- NotFoundError                    e.g. HUB_NOT_FOUND
    |   `-- AdapterNotFoundError         ADAPTER_NOT_FOUND
    |-- AdapterExistsError               ADAPTER_EXISTS
    |-- AdapterInvalidError              ADAPTER_INVALID        reasons, everything that cannot be served
    |-- AdapterCorruptError              ADAPTER_CORRUPT
    |-- AdapterInUseError                ADAPTER_IN_USE
    |-- OverloadedError                  QUEUE_FULL, ...        retry_after_seconds
    |-- OutOfResourcesError              OUT_OF_MEMORY, DISK_FULL, ADAPTER_SLOTS_FULL
    |-- UnavailableError                 no server, DRAINING, ENGINE_DOWN, HUB_UNREACHABLE; retry_after_seconds
    |-- AuthenticationError              no token, or a wrong one
    |-- PermissionDeniedError            e.g. HUB_ACCESS_DENIED
    |-- DeadlineExceededError            timeout_seconds passed
    |-- CancelledError                   the call was cancelled
    `-- ServerError                      a fault of the server; only its log knows more

The details are read from the `google.rpc.Status` a server attaches (ErrorInfo, BadRequest, PreconditionFailure,
RetryInfo). Without one, as from a proxy, the gRPC code alone decides.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

import grpc
from google.rpc import error_details_pb2, status_pb2

_DETAILS_KEY = "grpc-status-details-bin"


class ClientError(Exception):
    """A call that did not succeed.

    Attributes:
        code: The gRPC code.
        reason: The server's machine-readable reason such as ADAPTER_NOT_FOUND; empty if the server gave none.
        metadata: The values the message speaks of, by name.
        violations: (field, what is wrong with it); empty unless arguments were wrong.
        reasons: Everything that stands against what was asked; empty unless a precondition failed.
        retry_after_seconds: When another attempt makes sense; None if the server did not say.
    """

    def __init__(self, message: str, *, code: grpc.StatusCode, details: "ErrorDetails | None" = None) -> None:
        super().__init__(message)
        details = details or ErrorDetails()
        self.code = code
        self.reason = details.reason
        self.metadata = details.metadata
        self.violations = details.violations
        self.reasons = details.reasons
        self.retry_after_seconds = details.retry_after_seconds


class InvalidArgumentError(ClientError):
    """Fields of the request are wrong; `violations` lists all of them."""


class PromptTooLongError(InvalidArgumentError):
    """Prompt and answer together pass what the model or the server can hold; `metadata` has the numbers."""


class NotFoundError(ClientError):
    """What the call names does not exist."""


class AdapterNotFoundError(NotFoundError):
    """No adapter of this id, or of this version, is loaded. The base model never answers in its place."""


class AdapterExistsError(ClientError):
    """The id names other weights; load with `replace=True` to put the new ones in their place."""


class AdapterInvalidError(ClientError):
    """The adapter cannot be served; `reasons` lists everything that stands against it."""


class AdapterCorruptError(ClientError):
    """The adapter's files are damaged, or are not the ones expected."""


class AdapterInUseError(ClientError):
    """Requests still run on the adapter that was to be unloaded only when idle."""


class OverloadedError(ClientError):
    """The server has more work than it takes; `retry_after_seconds` tells when to try again."""


class OutOfResourcesError(ClientError):
    """The server has no memory, disk or adapter slot left for this; waiting alone may not help."""


class UnavailableError(ClientError):
    """No server answers, or it cannot work now; another attempt may succeed."""


class AuthenticationError(ClientError):
    """The server does not know the caller."""


class PermissionDeniedError(ClientError):
    """The caller, or the server on its behalf, may not do this."""


class DeadlineExceededError(ClientError):
    """The call's timeout passed. A load goes on in the server; a generation does not."""


class CancelledError(ClientError):
    """The call was cancelled, by this side or by the server."""


class ServerError(ClientError):
    """A fault of the server, or an answer this client does not understand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorDetails:
    """What a `google.rpc.Status` says beyond code and message; the fields are those of `ClientError`."""

    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    violations: tuple[tuple[str, str], ...] = ()
    reasons: tuple[str, ...] = ()
    retry_after_seconds: float | None = None


_BY_REASON: dict[str, type[ClientError]] = {
    "PROMPT_TOO_LONG": PromptTooLongError,
    "REQUEST_TOO_LARGE": PromptTooLongError,
    "ADAPTER_NOT_FOUND": AdapterNotFoundError,
    "ADAPTER_EXISTS": AdapterExistsError,
    "ADAPTER_INVALID": AdapterInvalidError,
    "ADAPTER_CORRUPT": AdapterCorruptError,
    "ADAPTER_IN_USE": AdapterInUseError,
    "ADAPTER_SLOTS_FULL": OutOfResourcesError,
    "OUT_OF_MEMORY": OutOfResourcesError,
    "DISK_FULL": OutOfResourcesError,
}

_BY_CODE: dict[grpc.StatusCode, type[ClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AdapterExistsError,
    grpc.StatusCode.DATA_LOSS: AdapterCorruptError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: CancelledError,
}


def from_rpc_error(error: grpc.RpcError) -> ClientError:
    """The typed error for what a gRPC call raised, synchronous or asyncio."""
    code = error.code()
    # the stubs describe entries as objects; in both kinds of call they are (key, value) tuples
    entries = cast(Iterable[tuple[str, str | bytes]], error.trailing_metadata() or ())
    details = _read_details(entries)
    kind = _BY_REASON.get(details.reason) or _BY_CODE.get(code, ServerError)
    return kind(error.details() or code.name, code=code, details=details)


def _read_details(trailing_metadata: Iterable[tuple[str, str | bytes]]) -> ErrorDetails:
    encoded = next((value for key, value in trailing_metadata if key == _DETAILS_KEY), b"")
    status = status_pb2.Status.FromString(encoded if isinstance(encoded, bytes) else encoded.encode())
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    precondition = error_details_pb2.PreconditionFailure()
    retry = error_details_pb2.RetryInfo()
    has_retry = False
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad_request)
        detail.Unpack(precondition)
        has_retry |= detail.Unpack(retry)
    return ErrorDetails(
        reason=info.reason,
        metadata=dict(info.metadata),
        violations=tuple((entry.field, entry.description) for entry in bad_request.field_violations),
        reasons=tuple(entry.description for entry in precondition.violations),
        retry_after_seconds=retry.retry_delay.ToTimedelta().total_seconds() if has_retry else None,
    )
