"""How much of the adapters one update reads: a count from the tables, which needs no clock and no noise.

Knows slots, tables and widths; knows no time and no cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasrv_kernels.batch import SlotBatch
from lorasrv_kernels.table import ABSENT, Column


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What is read of the adapters.

    Attributes:
        rank_rows: rows of A, each with its row of B^T.
        num_bytes: bytes of A, B^T, d and bias.
    """

    rank_rows: int = 0
    num_bytes: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(rank_rows=self.rank_rows + other.rank_rows, num_bytes=self.num_bytes + other.num_bytes)


def update_traffic(
    table: Tensor, slots: SlotBatch, *, in_features: int, out_features: Sequence[int], dtype: torch.dtype
) -> Traffic:
    """What `lora_apply_` reads: every tile its own slot's true ranks, once.

    Args:
        table: [S, G, 8] int64, as `lora_apply_` takes it.
        slots: which rows use which slot.
        in_features: I.
        out_features: the widths of the G slices.
        dtype: the arena's.
    """
    total = Traffic()
    for slot in slots.tile_slots.tolist():
        for entry, width in zip(table[slot].tolist(), out_features, strict=True):
            num_floats = width * sum(entry[column] != ABSENT for column in (Column.D, Column.BIAS))
            rank_bytes = entry[Column.RANK] * (in_features + width) * dtype.itemsize
            total += Traffic(rank_rows=entry[Column.RANK], num_bytes=rank_bytes + num_floats * torch.float32.itemsize)
    return total
