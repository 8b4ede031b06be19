"""The device memory of a server besides the base: one arena with the KV cache in front and the adapters behind.

Knows the model's sizes and where adapters lie; knows no request and no schedule.
"""

from collections.abc import Sequence

import torch
from lorasrv_adapters.image import ALIGN_ELEMENTS, AdapterImage
from lorasrv_adapters.records import AdapterObserver
from lorasrv_adapters.slots import AdapterSlots
from lorasrv_kernels.attention import BLOCK_TOKENS
from torch import Tensor

from lorasrv.engine.arena import Arena
from lorasrv.engine.request import Lease
from lorasrv.model.config import ModelConfig


class DeviceMemory:
    """Owns the arena buffer; engine thread only, no lock.

    Args:
        config: the model's sizes.
        module_shapes: (O, I) of every module an adapter may target, in the model's order.
        dtype: of the model; the cache and the rank rows have it, too.
        kv_bytes: bytes for KV blocks; at least one block is made.
        adapter_bytes: bytes for adapters; room for one of `max_rank` on all modules is always made, so that every
            adapter that was loaded fits once the others are idle.
        max_rank: largest rank of one module; larger adapters are refused when they are loaded.
        max_adapters: adapters on the device at once.
        observer: told of evictions; None: nobody is.
    """

    def __init__(
        self,
        config: ModelConfig,
        module_shapes: Sequence[tuple[int, int]],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        kv_bytes: int,
        adapter_bytes: int,
        max_rank: int,
        max_adapters: int,
        observer: AdapterObserver | None = None,
    ) -> None:
        block_shape = (config.num_layers, 2, config.num_kv_heads, BLOCK_TOKENS, config.head_size)
        block_elements = self.block_elements(config)
        self.layout = Arena(
            num_blocks=max(1, kv_bytes // (block_elements * dtype.itemsize)),
            block_elements=block_elements,
            extent_elements=max(
                adapter_bytes // dtype.itemsize, image_elements(module_shapes, rank=max_rank, dtype=dtype)
            ),
        )
        self.arena = torch.empty(self.layout.num_elements, dtype=dtype, device=device)
        self.kv_cache = self.arena[: self.layout.kv_elements].view(self.layout.num_blocks, *block_shape)
        self.slots = AdapterSlots(
            self.arena, self.layout, num_modules=len(module_shapes), max_adapters=max_adapters, observer=observer
        )

    @staticmethod
    def block_elements(config: ModelConfig) -> int:
        """Elements of one KV block: keys and values of 32 positions in all layers."""
        return config.num_layers * 2 * config.num_kv_heads * BLOCK_TOKENS * config.head_size

    @property
    def table(self) -> Tensor:
        """[S, M, 4] int64: where the rank rows of each slot and module are."""
        return self.slots.table

    def acquire(self, lease: Lease) -> int | None:
        """A slot with the lease's adapter, counted in use; None while every slot is used by running requests."""
        assert isinstance(lease.image, AdapterImage)
        return self.slots.acquire(lease.digest, lease.image)

    def release(self, slot: int) -> None:
        """Undoes one `acquire`."""
        self.slots.release(slot)


def image_elements(module_shapes: Sequence[tuple[int, int]], *, rank: int, dtype: torch.dtype) -> int:
    """Elements of the largest adapter of one rank: A, B^T and a scale on every module, each piece aligned."""
    scale_elements = torch.float32.itemsize // dtype.itemsize
    pieces = (size for o, i in module_shapes for size in (rank * i, rank * o, o * scale_elements))
    return sum(-(-size // ALIGN_ELEMENTS) * ALIGN_ELEMENTS for size in pieces)
