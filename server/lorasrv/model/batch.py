"""What one forward pass needs besides the tokens: positions, cache and adapters. Knows nothing of requests."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from lorasrv_kernels.attention import AttentionBatch
from lorasrv_kernels.batch import SlotBatch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterBatch:
    """Which adapters some token rows use, and where their numbers are."""

    slots: SlotBatch
    arena: Tensor  # [N]
    """Numbers of the resident adapters, and the cache."""
    table: Tensor  # [S, M, 8] int64
    """Per slot and module of the model's order: columns as in `lorasrv_kernels.table`."""
    touched: Collection[int]
    """The modules, as places in the model's order, that any of these adapters changes."""
    max_rank: int = 0
    """No adapter in the table has a higher rank; 0: not known."""

    def touches(self, modules: Iterable[int]) -> bool:
        """Whether any of these adapters changes one of these modules."""
        return any(module in self.touched for module in modules)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """T token rows of one step, laid out sequence after sequence."""

    positions: Tensor  # [T] int64
    attention: AttentionBatch
    adapters: AdapterBatch
    kv_cache: Tensor  # [P, L, 2, Hkv, 32, D], a view of the arena
