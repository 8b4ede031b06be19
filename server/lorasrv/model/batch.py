"""What one forward pass needs besides the tokens: positions, cache and adapters. Knows nothing of requests."""

from dataclasses import dataclass

from lorasrv_kernels.attention import AttentionBatch
from lorasrv_kernels.batch import SlotBatch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """T token rows of one step, laid out sequence after sequence."""

    positions: Tensor  # [T] int64
    attention: AttentionBatch
    slots: SlotBatch
    kv_cache: Tensor  # [P, L, 2, Hkv, 32, D], a view of the arena
    arena: Tensor  # [N]
    """Rank rows of the resident adapters, and the cache."""
    table: Tensor  # [S, M, 4] int64
    """Per slot and module of the model's order: offsets of A, B^T and d into the arena, and the rank."""
