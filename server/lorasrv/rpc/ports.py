"""What the services need from the rest of the server: the seams that tests fill with fakes.

Whoever implements them knows nothing of gRPC.
"""

from collections.abc import Sequence
from typing import Protocol

from lorasrv.engine.observer import EngineStats
from lorasrv.engine.request import Lease, Request


class EnginePort(Protocol):
    """The engine; `lorasrv.engine.engine.Engine` is one. Every method may be called from any thread."""

    def submit(self, request: Request) -> None:
        """Accepts a request, and with it its lease.

        Raises:
            QueueFullError: as many requests wait as may.
            DrainingError: the server is shutting down.
            EngineDownError: the engine does not run.
            RequestTooLargeError: it could not run even alone.
        """

    def cancel(self, request_id: str) -> None:
        """Ends a request early; one that already ended, or never was, is ignored."""

    def stats(self) -> EngineStats:
        """Returns the engine's state now."""


class Ranks(Protocol):
    """Ranks over an adapter's modules; `lorasrv_adapters.records.RankSummary` is one."""

    @property
    def min(self) -> int: ...

    @property
    def max(self) -> int: ...

    @property
    def sum(self) -> int: ...


class AdapterRecord(Protocol):
    """A loaded adapter; `lorasrv_adapters.records.AdapterRecord` is one."""

    @property
    def adapter_id(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def ranks(self) -> Ranks: ...

    @property
    def num_modules(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def num_in_use(self) -> int: ...

    @property
    def loaded_at_seconds(self) -> float: ...


class RegistryPort(Protocol):
    """The adapters; `lorasrv_adapters.registry.AdapterRegistry` is one. Errors are `lorasrv_adapters.errors`."""

    def acquire(self, reference: str) -> Lease:
        """Looks up and counts in use, in one step. May block while the adapter is read again."""

    def load(
        self, adapter_id: str, source: str, *, replace: bool = False, expected_digest: str | None = None
    ) -> AdapterRecord:
        """Loads and publishes an adapter. Blocks; concurrent loads of one id are one load."""

    def unload(self, adapter_id: str, *, if_idle: bool = False) -> AdapterRecord:
        """Withdraws an adapter; requests that hold it finish on it."""

    def get(self, adapter_id: str) -> AdapterRecord:
        """Returns one adapter."""

    def list(self) -> Sequence[AdapterRecord]:
        """Returns all adapters."""


class CallObserver(Protocol):
    """Told how calls end; `lorasrv.metrics.ServerMetrics` is one. Called on the event loop's thread."""

    def call_finished(self, *, method: str, code: str, finish_reason: str = "") -> None:
        """A call was answered with this status code; `finish_reason` where a generation ended well."""
