"""The second half of the low-rank update in Triton, for one tile of token rows and one block of columns.

A device function that `expand` of `triton_kernels` calls. Knows one row of the table; knows no launch.
"""

import triton
import triton.language as tl

from lorasrv_kernels.lora.triton_rows import expand_row, floats_of
from lorasrv_kernels.table import Column

_A = tl.constexpr(int(Column.A))
_B_T = tl.constexpr(int(Column.B_T))
_D = tl.constexpr(int(Column.D))
_RANK = tl.constexpr(int(Column.RANK))
_BIAS = tl.constexpr(int(Column.BIAS))
_ALIGNMENT = tl.constexpr(32)


@triton.jit
def expand_tile(
    y_columns,
    source,
    arena,
    entry,
    rows,
    weights,
    start,
    end,
    bias,
    base_bias,
    piece,
    width,
    columns,
    inside,
    num_entries,
    max_rank,
    y_row_stride,
    SLICES: tl.constexpr,
    NUM_PLANES: tl.constexpr,
    EMBEDDING: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One block of columns of the entries from `start` to `end`, which share the table's row `entry`."""
    true_rank = tl.load(entry + _RANK)
    d_offset = tl.load(entry + _D)
    bias_offset = tl.load(entry + _BIAS)
    if (true_rank > 0) | (d_offset >= 0) | (bias_offset >= 0) | (bias is not None):
        rank = true_rank.to(tl.int32) if EMBEDDING else tl.minimum(true_rank, max_rank).to(tl.int32)
        a = arena + tl.load(entry + _A)
        b_t = arena + tl.multiple_of(tl.load(entry + _B_T), _ALIGNMENT)
        d = tl.load(floats_of(arena, d_offset) + columns, mask=inside & (d_offset >= 0), other=1.0)
        own_bias = tl.load(floats_of(arena, bias_offset) + columns, mask=inside & (bias_offset >= 0), other=0.0)
        added = tl.where(bias_offset >= 0, own_bias, base_bias)
        # scratch holds max_rank; a wrong answer would be plausible, NaN is not
        added = tl.where(true_rank > rank, float("nan"), added)
        single = False
        if not EXACT:
            single = end == start + 1
        if single:
            row = tl.load(rows + start)
            if EMBEDDING:
                shrunk_row = a + tl.load(source + row) * rank
            else:
                shrunk_row = source + (start.to(tl.int64) * SLICES + piece) * max_rank
            plane_stride = num_entries.to(tl.int64) * SLICES * max_rank
            planes: tl.constexpr = 1 if EMBEDDING else NUM_PLANES
            product_row = expand_row(
                shrunk_row, plane_stride, b_t, rank, width, columns, inside, planes, BLOCK_R, BLOCK_O
            )
            at_row = y_columns + row * y_row_stride
            result_row = tl.load(at_row, mask=inside, other=0.0).to(tl.float32) * d
            result_row += tl.load(weights + start) * product_row + added
            tl.store(at_row, result_row.to(y_columns.dtype.element_ty), mask=inside)
        else:
            entries = start + tl.arange(0, TILE_ROWS)
            present = entries < end
            row_of = tl.load(rows + entries, mask=present, other=0)
            product = tl.zeros((TILE_ROWS, BLOCK_O), dtype=tl.float32)
            for first_rank in range(0, rank, BLOCK_R):
                ranks = first_rank + tl.arange(0, BLOCK_R)
                known = present[:, None] & (ranks < rank)[None, :]
                if EMBEDDING:
                    token = tl.load(source + row_of, mask=present, other=0)
                    shrunk = tl.load(a + token[:, None] * rank + ranks[None, :], mask=known, other=0.0)
                    shrunk = shrunk.to(tl.float32)
                else:
                    shrunk = tl.zeros((TILE_ROWS, BLOCK_R), dtype=tl.float32)
                    for plane in range(NUM_PLANES):
                        places = ((plane * num_entries).to(tl.int64) + entries) * SLICES + piece
                        at = source + places[:, None] * max_rank + ranks[None, :]
                        shrunk += tl.load(at, mask=known, other=0.0)
                b_block = tl.load(
                    b_t + ranks.to(tl.int64)[:, None] * width + columns[None, :],
                    mask=(ranks < rank)[:, None] & inside[None, :],
                    other=0.0,
                )
                product = tl.dot(shrunk, b_block.to(tl.float32), product, input_precision=PRECISION)
            weight = tl.load(weights + entries, mask=present, other=0.0)
            at = y_columns[None, :] + row_of[:, None] * y_row_stride
            mask = present[:, None] & inside[None, :]
            result = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            result = result * d[None, :] + weight[:, None] * product + added[None, :]
            tl.store(at, result.to(y_columns.dtype.element_ty), mask=mask)
