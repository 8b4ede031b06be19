"""`lora_apply_` and `lora_embed_` for CUDA: one launch that shrinks, one that expands, for all slots and slices.

`shrink` writes x A^T, `expand` multiplies with B^T and finishes the row. Both read ranks and offsets from the table on
the device; the host knows how long the batch's tensors are, the widths and a bound on the ranks, so that launches
depend on nothing else and a captured graph serves every batch of those lengths. I is cut into planes whose number
depends on I alone, and `expand` adds them in order, so a row's bits depend on nothing but the row and its adapter.

That holds where `exact` is asked for. Elsewhere a tile of a single row takes the programs of `triton_rows`, which need
no tensor core; tiles of several rows are multiplied as before, so that a row's bits may follow its neighbours.

Importing this module imports Triton.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorasrv_kernels.batch import TILE_ROWS
from lorasrv_kernels.lora.reference import LoraApply, LoraEmbed
from lorasrv_kernels.lora.triton_rows import shrink_row
from lorasrv_kernels.lora.triton_tiles import expand_tile
from lorasrv_kernels.table import Column

_A = tl.constexpr(int(Column.A))
_RANK = tl.constexpr(int(Column.RANK))
_ALIGNMENT = tl.constexpr(32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """Sizes of the blocks one program works on. Not measured on a device yet."""

    block_i: int = 128
    min_plane: int = 512
    """Input features of a plane, at least; a multiple of `block_i`."""
    max_planes: int = 16
    block_r: int = 16
    block_o: int = 128
    row_block_i: int = 512
    """Input features at a time of a tile of one row."""
    shrink_warps: int = 4
    shrink_stages: int = 4
    expand_warps: int = 4
    expand_stages: int = 2

    def plane(self, in_features: int) -> int:
        """Input features that one program of `shrink` adds up; a function of I, never of the batch."""
        even = -(-in_features // (self.max_planes * self.block_i)) * self.block_i
        return max(self.min_plane, even)


TILING = Tiling()


@triton.jit
def shrink(
    shrunk,
    x,
    arena,
    table,
    rows,
    tile_slots,
    tile_starts,
    num_entries,
    num_slices,
    max_rank,
    x_row_stride,
    x_column_stride,
    slot_stride,
    slice_stride,
    IN_FEATURES: tl.constexpr,
    PLANE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROW_BLOCK_I: tl.constexpr,
    FLOAT32: tl.constexpr,
    EXACT: tl.constexpr,
):
    """shrunk [planes, E, G, max_rank] float32 <- x A^T, each plane over its own part of I. Grid [K, planes, G].

    What lies beyond a slot's own rank is left as it was.
    """
    tile = tl.program_id(0)
    plane = tl.program_id(1)
    piece = tl.program_id(2)
    slot = tl.load(tile_slots + tile)
    if slot < 0:
        return
    entry = table + slot.to(tl.int64) * slot_stride + piece * slice_stride
    rank = tl.minimum(tl.load(entry + _RANK), max_rank).to(tl.int32)
    a = arena + tl.multiple_of(tl.load(entry + _A), _ALIGNMENT)
    start = tl.load(tile_starts + tile)
    end = tl.load(tile_starts + tile + 1)
    single = False
    if not EXACT:
        single = end == start + 1
    if single:
        place = (plane.to(tl.int64) * num_entries + start) * num_slices + piece
        shrink_row(
            shrunk + place * max_rank,
            x + tl.load(rows + start) * x_row_stride,
            x_column_stride,
            a,
            rank,
            plane * PLANE,
            IN_FEATURES,
            PLANE,
            ROW_BLOCK_I,
            BLOCK_R,
        )
        return
    entries = start + tl.arange(0, TILE_ROWS)
    present = entries < end
    x_rows = x + tl.load(rows + entries, mask=present, other=0)[:, None] * x_row_stride
    places = (plane.to(tl.int64) * num_entries + entries) * num_slices + piece
    for first_rank in range(0, rank, BLOCK_R):
        ranks = first_rank + tl.arange(0, BLOCK_R)
        total = tl.zeros((TILE_ROWS, BLOCK_R), dtype=tl.float32)
        for step in range(0, PLANE, BLOCK_I):
            features = plane * PLANE + step + tl.arange(0, BLOCK_I)
            inside = features < IN_FEATURES
            x_block = tl.load(
                x_rows + features.to(tl.int64)[None, :] * x_column_stride,
                mask=present[:, None] & inside[None, :],
                other=0.0,
            )
            a_block = tl.load(
                a + ranks.to(tl.int64)[None, :] * IN_FEATURES + features[:, None],
                mask=(ranks < rank)[None, :] & inside[:, None],
                other=0.0,
            )
            if FLOAT32:
                x_block = x_block.to(tl.float32)
                a_block = a_block.to(tl.float32)
            total = tl.dot(x_block, a_block, total, input_precision="ieee")
        tl.store(
            shrunk + places[:, None] * max_rank + ranks[None, :],
            total,
            mask=present[:, None] & (ranks < rank)[None, :],
        )


@triton.jit
def expand(
    y,
    source,
    arena,
    table,
    rows,
    weights,
    tile_slots,
    tile_starts,
    base_rows,
    bias,
    num_tiles,
    num_entries,
    num_base_rows,
    max_rank,
    y_row_stride,
    y_column_stride,
    slot_stride,
    slice_stride,
    OUT_FEATURES: tl.constexpr,
    NUM_PLANES: tl.constexpr,
    EMBEDDING: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """y <- d * y + weight * S B^T + bias, rounded once. Grid [tiles, blocks of columns over all slices].

    `source` is what `shrink` wrote, or of an embedding the tokens [T], whose rows of A [V, R] are S. After the K tiles
    come the base's rows, in tiles of their own. With a grid of one in its first axis a program takes all tiles in turn.
    """
    block = tl.program_id(1)
    piece = 0
    start = 0
    width = OUT_FEATURES[0]
    first_block = 0
    for g in tl.static_range(1, len(OUT_FEATURES)):
        first = _blocks_before(OUT_FEATURES, g, BLOCK_O)
        piece = tl.where(block >= first, g, piece)
        start = tl.where(block >= first, _columns_before(OUT_FEATURES, g), start)
        width = tl.where(block >= first, OUT_FEATURES[g], width)
        first_block = tl.where(block >= first, first, first_block)
    columns = (block - first_block) * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = columns < width
    y_columns = y + (start + columns).to(tl.int64) * y_column_stride
    base_bias = tl.zeros((BLOCK_O,), dtype=tl.float32)
    if bias is not None:
        base_bias = tl.load(bias + start + columns, mask=inside, other=0.0).to(tl.float32)
    for tile in range(tl.program_id(0), num_tiles + tl.cdiv(num_base_rows, TILE_ROWS), tl.num_programs(0)):
        if tile < num_tiles:
            slot = tl.load(tile_slots + tile)
            if slot >= 0:
                expand_tile(
                    y_columns,
                    source,
                    arena,
                    table + slot.to(tl.int64) * slot_stride + piece * slice_stride,
                    rows,
                    weights,
                    tl.load(tile_starts + tile),
                    tl.load(tile_starts + tile + 1),
                    bias,
                    base_bias,
                    piece,
                    width,
                    columns,
                    inside,
                    num_entries,
                    max_rank,
                    y_row_stride,
                    len(OUT_FEATURES),
                    NUM_PLANES,
                    EMBEDDING,
                    TILE_ROWS,
                    BLOCK_R,
                    BLOCK_O,
                    PRECISION,
                    EXACT,
                )
        else:
            places = (tile - num_tiles) * TILE_ROWS + tl.arange(0, TILE_ROWS)
            row = tl.load(base_rows + places, mask=places < num_base_rows, other=-1)
            at = y_columns[None, :] + row[:, None] * y_row_stride
            mask = (row >= 0)[:, None] & inside[None, :]
            result = tl.load(at, mask=mask, other=0.0).to(tl.float32) + base_bias[None, :]
            tl.store(at, result.to(y.dtype.element_ty), mask=mask)
        # the next tile may hold a row of this one
        tl.debug_barrier()


@triton.constexpr_function
def _blocks_before(out_features, piece, block):
    return sum(-(-width // block) for width in out_features[:piece])


@triton.constexpr_function
def _columns_before(out_features, piece):
    return sum(out_features[:piece])


_INTERPRETED = not isinstance(shrink, triton.JITFunction)
"""The interpreter computes bfloat16 wrongly without saying so, and gets everything in float32."""


def lora_apply_(call: LoraApply, *, tiling: Tiling = TILING) -> None:
    """See `lorasrv_kernels.lora.lora_apply_`. Arguments as the op takes them, on one CUDA device."""
    x, max_rank = call.x, call.max_rank
    table = _with_plain_columns(call.table)
    num_tiles, num_entries = len(call.tile_slots), len(call.rows)
    in_features, num_slices = x.shape[1], len(call.out_features)
    plane = tiling.plane(in_features)
    num_planes = -(-in_features // plane)
    if num_tiles:
        max_rank = max_rank or int(table[:, :, Column.RANK].max())
    # a fresh tensor, so that a captured graph owns it
    shrunk = x.new_empty((num_planes, num_entries, num_slices, max_rank), dtype=torch.float32)
    if num_tiles and max_rank:
        shrink[num_tiles, num_planes, num_slices](
            shrunk,
            x,
            call.arena,
            table,
            call.rows,
            call.tile_slots,
            call.tile_starts,
            num_entries,
            num_slices,
            max_rank,
            *x.stride(),
            *table.stride()[:2],
            IN_FEATURES=in_features,
            PLANE=plane,
            TILE_ROWS=TILE_ROWS,
            BLOCK_I=tiling.block_i,
            BLOCK_R=tiling.block_r,
            ROW_BLOCK_I=tiling.row_block_i,
            FLOAT32=_INTERPRETED,
            EXACT=call.exact,
            num_warps=tiling.shrink_warps,
            num_stages=tiling.shrink_stages,
        )
    _expand(call, shrunk, table, call.bias, max_rank, tuple(call.out_features), num_planes, tiling)


def lora_embed_(call: LoraEmbed, *, tiling: Tiling = TILING) -> None:
    """See `lorasrv_kernels.lora.lora_embed_`. Arguments as the op takes them, on one CUDA device."""
    table = _with_plain_columns(call.table)[:, None]
    _expand(call, call.tokens.contiguous(), table, None, 0, (call.y.shape[1],), 0, tiling)


def _with_plain_columns(table: Tensor) -> Tensor:
    return table if table.stride(-1) == 1 else table.contiguous()


def _expand(
    call: LoraApply | LoraEmbed,
    source: Tensor,
    table: Tensor,
    bias: Tensor | None,
    max_rank: int,
    out_features: tuple[int, ...],
    num_planes: int,
    tiling: Tiling,
) -> None:
    """`source` is of an embedding if `num_planes` is 0."""
    num_base_rows = 0 if bias is None else len(call.base_rows)
    num_tiles = len(call.tile_slots) + -(-num_base_rows // TILE_ROWS)
    num_blocks = sum(-(-width // tiling.block_o) for width in out_features)
    if not num_tiles or not num_blocks:
        return
    # rows of several slots are read and written by several tiles, which then must not run at the same time
    expand[1 if call.composed else num_tiles, num_blocks](
        call.y,
        source,
        call.arena,
        table,
        call.rows,
        call.weights,
        call.tile_slots,
        call.tile_starts,
        call.base_rows,
        None if bias is None else bias.contiguous(),
        len(call.tile_slots),
        len(call.rows),
        num_base_rows,
        max_rank,
        *call.y.stride(),
        *table.stride()[:2],
        OUT_FEATURES=out_features,
        NUM_PLANES=num_planes,
        EMBEDDING=num_planes == 0,
        TILE_ROWS=TILE_ROWS,
        BLOCK_R=tiling.block_r,
        BLOCK_O=tiling.block_o,
        PRECISION="ieee" if call.arena.dtype == torch.float32 else "tf32x3",
        EXACT=call.exact,
        num_warps=tiling.expand_warps,
        num_stages=tiling.expand_stages,
    )
