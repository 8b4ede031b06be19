"""Where a slot's adapter keeps its numbers: the columns of the table that every adapter kernel reads.

Knows offsets into an arena; knows nothing of adapters, models or who wrote the table.
"""

from enum import IntEnum

import torch
from torch import Tensor


class Column(IntEnum):
    """A column of the int64 table [S, M, 8]: one row per slot and module. Offsets count elements of the arena's dtype.

    `ROWS` holds rows that stand in place of rows of the module's own weight: all of them where `ROW_IDS` is absent,
    else those of the `NUM_ROWS` ascending ids.
    """

    A = 0  # [R, I]; of an embedding [V, R]
    B_T = 1  # [R, O]
    D = 2  # [O] float32
    RANK = 3
    BIAS = 4  # [O] float32
    ROWS = 5  # [NUM_ROWS, width of the weight]
    NUM_ROWS = 6
    ROW_IDS = 7  # [NUM_ROWS] int32


ABSENT = -1
"""The offset of what an adapter does not have."""

ABSENT_ROW = (ABSENT, ABSENT, ABSENT, 0, ABSENT, ABSENT, 0, ABSENT)
"""The row of a module that an adapter leaves alone."""

OFFSETS = (Column.A, Column.B_T, Column.D, Column.BIAS, Column.ROWS, Column.ROW_IDS)
"""The columns that move when an adapter does."""


def matrix_at(arena: Tensor, offset: int, num_rows: int, width: int) -> Tensor:
    """[num_rows, width] in the arena's dtype; a view."""
    return arena[offset : offset + num_rows * width].view(num_rows, width)


def floats_at(arena: Tensor, offset: int, count: int) -> Tensor:
    """[count] float32, stored in the arena as raw bytes; a view."""
    return _raw_at(arena, offset, count, torch.float32)


def ids_at(arena: Tensor, offset: int, count: int) -> Tensor:
    """[count] int32, stored in the arena as raw bytes; a view."""
    return _raw_at(arena, offset, count, torch.int32)


def raw_elements(count: int, element_bytes: int) -> int:
    """Arena elements of `element_bytes` that `count` raw 4-byte numbers take."""
    return count * 4 // element_bytes


def _raw_at(arena: Tensor, offset: int, count: int, dtype: torch.dtype) -> Tensor:
    return arena[offset : offset + raw_elements(count, arena.element_size())].view(dtype)
