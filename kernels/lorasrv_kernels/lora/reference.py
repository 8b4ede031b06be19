"""The specification of `lora_apply_` and `lora_embed_`: a loop over tiles and slices, in float32.

For token rows t of slot s and slice g, with rank R and the slice's columns of y:

    y[t] <- d[s, g] * y[t] + weight[t] * (x[t] A[s, g]^T) B[s, g]^T + bias[s, g]        rounded once to y's dtype

In an embedding x[t] is the one-hot vector of the token. Sums run over I and then over R, both in one order that depends
on I and R alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorasrv_kernels.batch import NO_ROW, TILE_ROWS
from lorasrv_kernels.table import ABSENT, Column, floats_at, matrix_at
from lorasrv_kernels.workspace import thread_workspace


class LoraApply(NamedTuple):
    """Arguments of `lora_apply_`: E entries of rows in K tiles, as `SlotBatch` states them."""

    y: Tensor  # [T, O]
    x: Tensor  # [T, I]
    arena: Tensor  # [N]
    table: Tensor  # [S, G, 8] int64
    out_features: Sequence[int]
    rows: Tensor  # [E] int64
    weights: Tensor  # [E]
    tile_slots: Tensor  # [K]
    tile_starts: Tensor  # [K + 1]
    base_rows: Tensor  # [T'] int64
    bias: Tensor | None  # [O]
    max_rank: int = 0
    composed: bool = False
    exact: bool = True


class LoraEmbed(NamedTuple):
    """Arguments of `lora_embed_`."""

    y: Tensor  # [T, O]
    tokens: Tensor  # [T] int64
    arena: Tensor  # [N]
    table: Tensor  # [S, 8] int64
    rows: Tensor  # [E] int64
    weights: Tensor  # [E]
    tile_slots: Tensor  # [K]
    tile_starts: Tensor  # [K + 1]
    base_rows: Tensor  # [T'] int64
    composed: bool = False
    exact: bool = True


def lora_apply_(call: LoraApply) -> None:
    """See `lorasrv_kernels.lora.lora_apply_`."""
    y, x, arena, table, out_features, rows, weights, tile_slots, tile_starts, base_rows, bias, *_ = call
    entries = table.tolist()
    starts = tile_starts.tolist()
    x_tile = _padded_tile("lora.x_tile", x.shape[1], x.device)
    for tile, slot in enumerate(tile_slots.tolist()):
        tile_rows = rows[starts[tile] : starts[tile + 1]]
        x_tile[: len(tile_rows)] = x[tile_rows]
        x_tile[len(tile_rows) :].zero_()
        tile_weights = weights[starts[tile] : starts[tile + 1], None]
        start = 0
        for entry, width in zip(entries[slot], out_features, strict=True):
            own = None if bias is None else bias[start : start + width]
            _apply_slice(y[:, start : start + width], x_tile, arena, entry, tile_rows, tile_weights, own)
            start += width
    if bias is not None:
        y[base_rows[base_rows != NO_ROW]] += bias


def lora_embed_(call: LoraEmbed) -> None:
    """See `lorasrv_kernels.lora.lora_embed_`."""
    y, tokens, arena, table, rows, weights, tile_slots, tile_starts, *_ = call
    entries = table.tolist()
    starts = tile_starts.tolist()
    for tile, slot in enumerate(tile_slots.tolist()):
        tile_rows = rows[starts[tile] : starts[tile + 1]]
        rank = entries[slot][Column.RANK]
        shrunk = _padded_tile("lora.shrunk", max(rank, 1), y.device).zero_()
        if rank > 0:
            places = tokens[tile_rows, None] * rank + torch.arange(rank, device=y.device)
            shrunk[: len(tile_rows)] = arena[entries[slot][Column.A] + places]
        _expand(y, shrunk, arena, entries[slot], tile_rows, weights[starts[tile] : starts[tile + 1], None], None)


def _padded_tile(name: str, width: int, device: torch.device) -> Tensor:
    # rows on 16-byte borders, because the library's narrow products add in another order where they are not
    return thread_workspace().take(name, (TILE_ROWS, -(-width // 4) * 4), torch.float32, device)[:, :width]


def _apply_slice(
    y: Tensor, x_tile: Tensor, arena: Tensor, entry: Sequence[int], rows: Tensor, weights: Tensor, bias: Tensor | None
) -> None:
    shrunk = x_tile
    if entry[Column.RANK] > 0:
        shrunk = x_tile @ matrix_at(arena, entry[Column.A], entry[Column.RANK], x_tile.shape[1]).float().T
    _expand(y, shrunk, arena, entry, rows, weights, bias)


def _expand(
    y: Tensor, shrunk: Tensor, arena: Tensor, entry: Sequence[int], rows: Tensor, weights: Tensor, bias: Tensor | None
) -> None:
    """d * y + weights * shrunk B^T + bias, in the rows of one tile; `shrunk` is [TILE_ROWS, R] float32, if R > 0."""
    rank, width = entry[Column.RANK], y.shape[1]
    if rank == 0 and entry[Column.D] == entry[Column.BIAS] == ABSENT and bias is None:
        return
    result = y[rows].float()
    if entry[Column.D] != ABSENT:
        result *= floats_at(arena, entry[Column.D], width)
    if rank > 0:
        b_t = matrix_at(arena, entry[Column.B_T], rank, width).float()
        result += weights * (shrunk @ b_t)[: len(rows)]
    if entry[Column.BIAS] != ABSENT:
        result += floats_at(arena, entry[Column.BIAS], width)
    elif bias is not None:
        result += bias
    y[rows] = result.to(y.dtype)
