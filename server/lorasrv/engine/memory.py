"""The device memory of a server besides the base: one arena with the KV cache in front and the adapters behind.

Knows the model's sizes and where adapters lie; knows no request and no schedule.
"""

from collections.abc import Collection, Sequence

import torch
from lorasrv_adapters.base import BaseModel, table_order
from lorasrv_adapters.image import ALIGN_ELEMENTS, AdapterImage
from lorasrv_adapters.records import AdapterObserver
from lorasrv_adapters.slots import AdapterSlots
from lorasrv_kernels.attention import BLOCK_TOKENS
from lorasrv_kernels.batch import SlotBatch

from lorasrv.engine.arena import Arena
from lorasrv.engine.request import Lease
from lorasrv.model.batch import AdapterBatch
from lorasrv.model.config import ModelConfig


class DeviceMemory:
    """Owns the arena buffer; engine thread only, no lock.

    Attributes:
        layout: how the arena is divided.
        kv_cache: [P, L, 2, Hkv, 32, D], a view of the arena.
        slots: the resident adapters.
        exact: as it was given.

    Args:
        config: the model's sizes.
        base: what adapters know of the model.
        dtype: of the model; the cache and the rank rows have it, too.
        kv_bytes: bytes for KV blocks; at least one block is made.
        adapter_bytes: bytes for adapters; room for one of `max_rank` on all linear layers is always made. An adapter
            that is loaded must fit in there alone, so that it does once the others are idle.
        max_rank: largest rank of one module; larger adapters are refused when they are loaded.
        max_adapters: adapters on the device at once.
        exact: whether no row's bits may depend on its neighbours, where giving that up is faster.
        observer: told of evictions; None: nobody is.
    """

    def __init__(
        self,
        config: ModelConfig,
        base: BaseModel,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        kv_bytes: int,
        adapter_bytes: int,
        max_rank: int,
        max_adapters: int,
        exact: bool = True,
        observer: AdapterObserver | None = None,
    ) -> None:
        block_shape = (config.num_layers, 2, config.num_kv_heads, BLOCK_TOKENS, config.head_size)
        block_elements = self.block_elements(config)
        self.layout = Arena(
            num_blocks=max(1, kv_bytes // (block_elements * dtype.itemsize)),
            block_elements=block_elements,
            extent_elements=max(adapter_bytes // dtype.itemsize, image_elements(base, rank=max_rank, dtype=dtype)),
        )
        self.arena = torch.empty(self.layout.num_elements, dtype=dtype, device=device)
        self.kv_cache = self.arena[: self.layout.kv_elements].view(self.layout.num_blocks, *block_shape)
        self.exact = exact
        self._max_rank = max_rank
        self.slots = AdapterSlots(
            self.arena, self.layout, num_modules=len(table_order(base)), max_adapters=max_adapters, observer=observer
        )

    @staticmethod
    def block_elements(config: ModelConfig) -> int:
        """Elements of one KV block: keys and values of 32 positions in all layers."""
        return config.num_layers * 2 * config.num_kv_heads * BLOCK_TOKENS * config.head_size

    @property
    def adapter_bytes(self) -> int:
        """Bytes there are for adapters."""
        return self.layout.extent_elements * self.arena.itemsize

    def adapters(self, slots: Sequence[int]) -> AdapterBatch:
        """Describes token rows by the slot of each; `NO_SLOT` for the plain base."""
        return self.adapter_batch(
            SlotBatch.from_slots(slots, device=self.arena.device, exact=self.exact), touched=self.slots.touched(slots)
        )

    def adapter_batch(self, slots: SlotBatch, touched: Collection[int]) -> AdapterBatch:
        """Describes token rows whose slots are on the device already; `touched` as in `AdapterBatch`."""
        return AdapterBatch(
            slots=slots, arena=self.arena, table=self.slots.table, touched=touched, max_rank=self._max_rank
        )

    def acquire(self, lease: Lease) -> int | None:
        """A slot with the lease's adapter, counted in use; None while every slot is used by running requests."""
        assert isinstance(lease.image, AdapterImage)
        return self.slots.acquire(lease.digest, lease.image)

    def release(self, slot: int) -> None:
        """Undoes one `acquire`."""
        self.slots.release(slot)


def image_elements(base: BaseModel, *, rank: int, dtype: torch.dtype) -> int:
    """Elements of the largest adapter of one rank: A, B^T, scale and bias on every linear layer, each piece aligned."""
    float_elements = torch.float32.itemsize // dtype.itemsize
    shapes = [(module.out_features, module.in_features) for module in base.modules.values() if module.kind == "linear"]
    pieces = (size for o, i in shapes for size in (rank * i, rank * o, o * float_elements, o * float_elements))
    return sum(-(-size // ALIGN_ELEMENTS) * ALIGN_ELEMENTS for size in pieces)
