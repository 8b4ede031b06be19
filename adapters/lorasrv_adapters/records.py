"""What is told about adapters, and the seams between the registry and its surroundings.

It knows no file, no lock and no device.
"""

from dataclasses import dataclass
from typing import Protocol

from lorasrv_adapters.image import AdapterImage


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSummary:
    """Ranks over an adapter's modules.

    Attributes:
        min: The smallest.
        max: The largest.
        sum: All of them together: the rank rows it occupies.
    """

    min: int
    max: int
    sum: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedAdapter:
    """What a loader brings.

    Attributes:
        digest: 64 hexadecimal digits.
        kind: "lora", "rslora", "dora" or "adalora".
        ranks: Ranks over its modules.
        num_modules: How many modules it adapts.
        image: What the device will read.
    """

    digest: str
    kind: str
    ranks: RankSummary
    num_modules: int
    image: AdapterImage


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRecord:
    """A loaded adapter as seen at one moment.

    Attributes:
        adapter_id: Its id.
        source: Where it came from.
        digest: 64 hexadecimal digits over everything that changes its result.
        kind: "lora", "rslora", "dora" or "adalora".
        ranks: Ranks over its modules.
        num_bytes: Bytes of its image.
        num_modules: How many modules it adapts.
        num_in_use: Leases held under this id, replaced versions included.
        loaded_at_seconds: When this version was loaded, in the registry's clock (Unix time).
    """

    adapter_id: str
    source: str
    digest: str
    kind: str
    ranks: RankSummary
    num_bytes: int
    num_modules: int
    num_in_use: int
    loaded_at_seconds: float


class AdapterLoader(Protocol):
    """Brings an adapter from where it is stored."""

    def load(self, source: str) -> LoadedAdapter:
        """Read, check and pack the adapter; blocks; any thread.

        Raises:
            AdapterError: It cannot be read or served.
        """


class AdapterObserver(Protocol):
    """Is told what happens to adapters; called without a lock held, from whichever thread did it."""

    def adapter_loaded(self, record: AdapterRecord, seconds: float) -> None:
        """A load ended well after this time; it may have found the same digest already loaded."""

    def adapter_load_failed(self, reason: str) -> None:
        """A load failed; `reason` is the error's `AdapterError.reason`."""

    def adapter_unloaded(self, adapter_id: str) -> None:
        """The id answers no more."""

    def adapter_evicted(self, level: str) -> None:
        """An idle adapter lost its place on "host" or "device"."""


class SilentObserver:
    """An observer that does nothing."""

    def adapter_loaded(self, record: AdapterRecord, seconds: float) -> None:
        """Do nothing."""

    def adapter_load_failed(self, reason: str) -> None:
        """Do nothing."""

    def adapter_unloaded(self, adapter_id: str) -> None:
        """Do nothing."""

    def adapter_evicted(self, level: str) -> None:
        """Do nothing."""
