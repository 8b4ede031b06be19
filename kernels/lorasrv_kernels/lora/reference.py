"""The specification of `lora_apply_`: a loop over tiles and slices, in float32.

For token rows t of slot s and slice g, with rank R and the slice's columns of y:

    y[t] <- d[s, g] * y[t] + weight[t] * (x[t] A[s, g]^T) B[s, g]^T        rounded once to y's dtype

Sums run over I and then over R, both in one order that depends on I and R alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorasrv_kernels.batch import TILE_ROWS
from lorasrv_kernels.workspace import thread_workspace

TABLE_COLUMNS = 4
"""A [R, I], B^T [R, O] and d [O] as offsets into the arena in elements, and the rank R."""

ABSENT = -1
"""The offset of a `d` that is 1 everywhere."""


def lora_apply_(
    y: Tensor,
    x: Tensor,
    arena: Tensor,
    table: Tensor,
    out_features: Sequence[int],
    rows: Tensor,
    weights: Tensor,
    tile_slots: Tensor,
    tile_starts: Tensor,
) -> None:
    """See `lorasrv_kernels.lora.lora_apply_`."""
    entries = table.tolist()
    starts = tile_starts.tolist()
    in_features = x.shape[1]
    # rows on 16-byte borders, because the library's narrow products add in another order where they are not
    x_tile = thread_workspace().take("lora.x_tile", (TILE_ROWS, -(-in_features // 4) * 4), torch.float32, x.device)
    x_tile = x_tile[:, :in_features]
    for tile, slot in enumerate(tile_slots.tolist()):
        tile_rows = rows[starts[tile] : starts[tile + 1]]
        x_tile[: len(tile_rows)] = x[tile_rows]
        x_tile[len(tile_rows) :].zero_()
        tile_weights = weights[starts[tile] : starts[tile + 1], None]
        start = 0
        for entry, width in zip(entries[slot], out_features, strict=True):
            _apply_slice(y[:, start : start + width], x_tile, arena, entry, tile_rows, tile_weights)
            start += width


def _apply_slice(y: Tensor, x_tile: Tensor, arena: Tensor, entry: Sequence[int], rows: Tensor, weights: Tensor) -> None:
    a_offset, b_offset, d_offset, rank = entry
    if rank == 0 and d_offset == ABSENT:
        return
    in_features, out_features = x_tile.shape[1], y.shape[1]
    result = y[rows].float()
    if d_offset != ABSENT:
        result *= scale_at(arena, d_offset, out_features)
    if rank > 0:
        a = arena[a_offset : a_offset + rank * in_features].view(rank, in_features).float()
        b_t = arena[b_offset : b_offset + rank * out_features].view(rank, out_features).float()
        result += weights * (x_tile @ a.T @ b_t)[: len(rows)]
    y[rows] = result.to(y.dtype)


def scale_at(arena: Tensor, offset: int, out_features: int) -> Tensor:
    """d [O] float32, stored in the arena at an offset counted in the arena's own elements."""
    num_elements = out_features * 4 // arena.element_size()
    return arena[offset : offset + num_elements].view(torch.float32)
