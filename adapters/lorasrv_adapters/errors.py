"""Errors of this package.

AdapterError
|-- InvalidAdapterIdError       the id or reference does not follow the grammar
|-- AdapterNotFoundError        no adapter of that id, or no such version of it
|-- AdapterExistsError          the id already names another digest
|-- AdapterInUseError           running requests use it
|-- AdapterIncompatibleError    well-formed, but it cannot be served on this base
|-- AdapterCorruptError         damaged: truncated, malformed, or not the expected digest
|-- AdapterConversionError      it cannot be written in the wanted form without a change of meaning
|-- SlotsExhaustedError         it can never fit on the device
`-- AdapterSourceError          the place it should come from
    |-- SourceNotAllowedError   outside the roots, or not on the allow-list
    |-- SourceNotFoundError     nothing there
    |-- HubUnreachableError     no connection, a timeout, or a server fault; trying again can help
    `-- HubAccessDeniedError    the Hub refused the token
"""

from collections.abc import Sequence
from typing import ClassVar

MAX_REASONS_SHOWN = 20
"""How many reasons a message spells out; the error's `reasons` holds all of them."""


class AdapterError(Exception):
    """Base of every error raised by this package."""

    reason: ClassVar[str] = "ADAPTER_ERROR"
    """A stable upper-case word for machines: metrics labels and ErrorInfo."""


class InvalidAdapterIdError(AdapterError):
    """The id or reference does not follow the grammar.

    Attributes:
        reference: What came.
        rule: The rule it breaks.
    """

    reason = "INVALID_REQUEST"

    def __init__(self, reference: str, rule: str) -> None:
        super().__init__(f"invalid adapter id {reference[:160]!r}: {rule}")
        self.reference = reference
        self.rule = rule


class AdapterNotFoundError(AdapterError):
    """No adapter of that id is loaded, or no such version of it.

    Attributes:
        adapter_id: The id or reference asked for.
    """

    reason = "ADAPTER_NOT_FOUND"

    def __init__(self, adapter_id: str) -> None:
        super().__init__(f"adapter {adapter_id!r} is not loaded")
        self.adapter_id = adapter_id


class AdapterExistsError(AdapterError):
    """The id already names another digest, and replacing was not asked for.

    Attributes:
        adapter_id: The id.
        served_digest: Digest served under that id now.
        new_digest: Digest of the adapter that was to be loaded.
    """

    reason = "ADAPTER_EXISTS"

    def __init__(self, adapter_id: str, *, served_digest: str, new_digest: str) -> None:
        super().__init__(
            f"adapter {adapter_id!r} is loaded with digest {served_digest[:12]}, not {new_digest[:12]}; "
            "load it with replace, or under another id"
        )
        self.adapter_id = adapter_id
        self.served_digest = served_digest
        self.new_digest = new_digest


class AdapterInUseError(AdapterError):
    """Unloading was asked for only if idle, and running requests use the adapter.

    Attributes:
        adapter_id: The id.
        num_in_use: Requests that hold it now.
    """

    reason = "ADAPTER_IN_USE"

    def __init__(self, adapter_id: str, *, num_in_use: int) -> None:
        super().__init__(f"adapter {adapter_id!r} is used by {num_in_use} running requests")
        self.adapter_id = adapter_id
        self.num_in_use = num_in_use


class _ReasonedError(AdapterError):
    """An error with a list of everything that is wrong, not only the first thing."""

    summary: ClassVar[str]

    def __init__(self, reasons: Sequence[str]) -> None:
        shown = list(reasons[:MAX_REASONS_SHOWN])
        if len(reasons) > len(shown):
            shown.append(f"and {len(reasons) - len(shown)} more")
        super().__init__(f"{self.summary}: " + "; ".join(shown))
        self.reasons = tuple(reasons)


class AdapterIncompatibleError(_ReasonedError):
    """The adapter is well-formed, but it cannot be served on this base.

    Attributes:
        reasons: Everything that stands in the way, one sentence each.
    """

    reason = "ADAPTER_INVALID"
    summary = "the adapter cannot be served"


class AdapterCorruptError(_ReasonedError):
    """The adapter's files are damaged, or are not the ones that were expected.

    Attributes:
        reasons: Everything that is wrong, one sentence each.
    """

    reason = "ADAPTER_CORRUPT"
    summary = "the adapter is damaged"


class AdapterConversionError(_ReasonedError):
    """The adapter cannot be written in the wanted form without a change of meaning, or without a risk.

    Attributes:
        reasons: Everything that stands in the way, one sentence each.
    """

    reason = "ADAPTER_NOT_CONVERTED"
    summary = "the adapter cannot be converted"


class SlotsExhaustedError(AdapterError):
    """The adapter can never fit on the device.

    Attributes:
        num_bytes: Bytes it needs.
        limit_bytes: Bytes there are.
    """

    reason = "ADAPTER_SLOTS_FULL"

    def __init__(self, *, num_bytes: int, limit_bytes: int) -> None:
        super().__init__(f"the adapter needs {num_bytes} bytes on the device; there are {limit_bytes}")
        self.num_bytes = num_bytes
        self.limit_bytes = limit_bytes


class AdapterSourceError(AdapterError):
    """Something is wrong with the place an adapter should come from.

    Attributes:
        source: The source as it was given.
    """

    reason = "ADAPTER_SOURCE"

    def __init__(self, source: str, detail: str) -> None:
        super().__init__(f"adapter source {source!r}: {detail}")
        self.source = source
        self.detail = detail


class SourceNotAllowedError(AdapterSourceError):
    """The source is outside every root, or not on the allow-list."""

    reason = "SOURCE_NOT_ALLOWED"


class SourceNotFoundError(AdapterSourceError):
    """There is nothing at the source."""

    reason = "SOURCE_NOT_FOUND"


class HubUnreachableError(AdapterSourceError):
    """The Hub did not answer, or answered with a fault of its own; trying again can help."""

    reason = "HUB_UNREACHABLE"


class HubAccessDeniedError(AdapterSourceError):
    """The Hub refused access with the server's token."""

    reason = "HUB_ACCESS_DENIED"
