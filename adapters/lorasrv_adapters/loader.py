"""From a source to an image: resolve, read, check, normalize, pack.

It knows a base by its interface, and the limits of the device it packs for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorasrv_adapters.base import BaseModel
from lorasrv_adapters.checkpoint import read_checkpoint
from lorasrv_adapters.errors import AdapterIncompatibleError, SlotsExhaustedError
from lorasrv_adapters.image import pack_image
from lorasrv_adapters.normalize import NormalizedAdapter
from lorasrv_adapters.records import LoadedAdapter, RankSummary
from lorasrv_adapters.source import resolve
from lorasrv_adapters.weights import DEFAULT_LIMITS, WeightLimits

if TYPE_CHECKING:
    from lorasrv_adapters.hub import HubSource


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointLoader:
    """Loads PEFT folders for one base; implements `records.AdapterLoader`.

    Attributes:
        base: The base as served.
        dtype: The arena's dtype.
        max_rank: Largest rank the kernels' scratch has room for.
        max_bytes: Room for adapters on the device; no adapter may need more.
        roots: Folders below which adapters may lie.
        hub: The Hub and what is allowed from it; None: nothing is.
        limits: What a weights file may ask for.
        pins: Whether images lie in page-locked memory, for a device that is a GPU.
    """

    base: BaseModel
    dtype: torch.dtype
    max_rank: int
    max_bytes: int
    roots: Sequence[Path]
    hub: "HubSource | None" = None
    limits: WeightLimits = DEFAULT_LIMITS
    pins: bool = False

    def load(self, source: str) -> LoadedAdapter:
        """Find, read, check and pack an adapter; blocks; any thread.

        Raises:
            AdapterError: It cannot be found, read or served.
        """
        return self.read(self.locate(source))

    def locate(self, source: str) -> Path:
        """Return the folder a source names, downloaded if need be.

        Raises:
            AdapterError: It is not allowed, or there is nothing.
        """
        return resolve(source, roots=self.roots, hub=self.hub)

    def read(self, folder: Path) -> LoadedAdapter:
        """Read, check and pack the adapter of a folder.

        Raises:
            AdapterError: It cannot be read or served.
        """
        adapter = read_checkpoint(folder, self.base, limits=self.limits)
        self._check_ranks(adapter)
        ranks = adapter.ranks.values()
        image = pack_image(adapter, self.base, self.dtype)
        if image.flat.nbytes > self.max_bytes:
            raise SlotsExhaustedError(num_bytes=image.flat.nbytes, limit_bytes=self.max_bytes)
        return LoadedAdapter(
            digest=adapter.digest,
            kind=adapter.kind,
            ranks=RankSummary(min=min(ranks), max=max(ranks), sum=sum(ranks)),
            num_modules=len(adapter.modules),
            image=image.pinned() if self.pins else image,
        )

    def _check_ranks(self, adapter: NormalizedAdapter) -> None:
        too_large = [
            f"{name}: rank {rank} exceeds the server's limit of {self.max_rank}"
            for name, rank in adapter.ranks.items()
            if rank > self.max_rank
        ]
        if too_large:
            raise AdapterIncompatibleError(too_large)
