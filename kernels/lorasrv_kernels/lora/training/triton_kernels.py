"""The trainable low-rank update on CUDA in Triton: two launches, whatever the adapters.

`shrink` writes x A^T, or of the incoming gradient d * grad B; `expand` multiplies with B^T and finishes the rows, or
with A and gives the gradient of x. No result depends on the other adapters.

Products are float32: exact for float32 activations, three TF32 products for the others. Offsets within one A or B are
32 bits wide, which holds 2^31 numbers, and saves the registers that would spill. Nothing here has been timed on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorasrv_kernels.lora.training.reference import LoraUpdate, any_d
from lorasrv_kernels.lora.training.triton_plan import (
    A_START,
    B_START,
    COLUMN,
    D_START,
    LAST_ROW,
    NUM_COLUMNS,
    PLACE,
    RANK,
    TILING,
    WIDTH,
    Plan,
    Tiling,
    flat_factors,
    plan,
    precision,
    rows_together,
)


def lora_update(call: LoraUpdate, *, tiling: Tiling = TILING) -> Tensor:
    """See `lorasrv_kernels.lora.training.lora_update`. Arguments as the op takes them, on one CUDA device."""
    y, x = rows_together(call.y), rows_together(call.x)
    result = y.new_empty(y.shape)
    layout = plan(call, tiling)
    if not len(layout.tiles):
        return result
    a, b, d = flat_factors(call)
    num_slices = len(call.out_features)
    shrunk = x.new_empty(len(x), layout.width, dtype=torch.float32)
    launch_shrink(shrunk, x, a, None, layout, num_slices, backward=False, tiling=tiling)
    sizes = (layout.table, layout.tiles, num_slices, max(call.out_features))
    launch_expand(result, shrunk, b, sizes, tiling, y=y, d=d if any_d(call.d) else None, scales=layout.scales)
    return result


@triton.jit
def shrink(
    out,  # [T, out_stride] float32
    x,  # [T, ...], rows x_stride apart
    matrix,  # A of all adapters, or B
    d,  # of all adapters, or None
    scales,
    table,
    tiles,
    num_slices,
    out_stride,
    x_stride,
    IN_FEATURES: tl.constexpr,
    BACKWARD: tl.constexpr,
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out <- x A^T, or backward scale * (d * x) B, x then being the incoming gradient. Grid [tiles, slices]."""
    tile = tiles + 2 * tl.program_id(0)
    piece = tl.load(tile) * num_slices + tl.program_id(1)
    entry = table + piece * NUM_COLUMNS
    rank = tl.load(entry + RANK).to(tl.int32)
    length = tl.load(entry + WIDTH).to(tl.int32) if BACKWARD else IN_FEATURES
    first = tl.load(entry + COLUMN) if BACKWARD else 0
    place = tl.load(entry + PLACE)
    d_offset = tl.load(entry + D_START)
    rows = tl.load(tile + 1) + tl.arange(0, TOKENS)
    present = rows < tl.load(entry + LAST_ROW)
    x_rows = x + rows[:, None] * x_stride + first
    own_matrix = matrix + (tl.load(entry + B_START) if BACKWARD else tl.load(entry + A_START) * IN_FEATURES)
    for first_rank in range(0, rank, RANKS):
        ranks = first_rank + tl.arange(0, RANKS)
        known = ranks < rank
        total = tl.zeros((TOKENS, RANKS), dtype=tl.float32)
        for step in range(0, length, DEPTH):
            features = step + tl.arange(0, DEPTH)
            inside = features < length
            part = tl.load(x_rows + features[None, :], mask=present[:, None] & inside[None, :], other=0.0)
            part = part.to(tl.float32)
            if BACKWARD:
                at = features[:, None] * rank + ranks[None, :]
                if d is not None:
                    own = tl.load(d + d_offset + features, mask=inside & (d_offset >= 0), other=1.0)
                    part *= own[None, :]
            else:
                at = ranks[None, :] * IN_FEATURES + features[:, None]
            factor = tl.load(own_matrix + at, mask=inside[:, None] & known[None, :], other=0.0)
            total = tl.dot(part, factor, total, input_precision=PRECISION)
        if BACKWARD:
            total *= tl.load(scales + piece)
        at = out + rows[:, None] * out_stride + place + ranks[None, :]
        tl.store(at, total, mask=present[:, None] & known[None, :])


@triton.jit
def expand(
    out,  # [T, ...], rows out_stride apart
    shrunk,  # [T, shrunk_stride] float32
    matrix,  # B of all adapters, or A
    y,  # [T, ...] or None, for A
    d,  # of all adapters, or None
    scales,  # None for A
    table,
    tiles,
    num_slices,
    out_stride,
    y_stride,
    shrunk_stride,
    IN_FEATURES: tl.constexpr,
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out <- d * (y + scale * shrunk B^T), or shrunk A. Grid [tiles, blocks of columns, slices]."""
    tile = tiles + 2 * tl.program_id(0)
    piece = tl.load(tile) * num_slices + tl.program_id(2)
    entry = table + piece * NUM_COLUMNS
    width = tl.load(entry + WIDTH).to(tl.int32)
    if tl.program_id(1) * COLUMNS >= width:
        return
    rank = tl.load(entry + RANK).to(tl.int32)
    place = tl.load(entry + PLACE)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    rows = tl.load(tile + 1) + tl.arange(0, TOKENS)
    present = rows < tl.load(entry + LAST_ROW)
    own_matrix = matrix + (tl.load(entry + B_START) if y is not None else tl.load(entry + A_START) * IN_FEATURES)
    total = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for first_rank in range(0, rank, RANKS):
        ranks = first_rank + tl.arange(0, RANKS)
        known = ranks < rank
        at = shrunk + rows[:, None] * shrunk_stride + place + ranks[None, :]
        part = tl.load(at, mask=present[:, None] & known[None, :], other=0.0)
        if y is not None:
            at_factor = columns[None, :] * rank + ranks[:, None]
        else:
            at_factor = ranks[:, None] * IN_FEATURES + columns[None, :]
        factor = tl.load(own_matrix + at_factor, mask=known[:, None] & inside[None, :], other=0.0)
        total = tl.dot(part, factor, total, input_precision=PRECISION)
    mask = present[:, None] & inside[None, :]
    first = tl.load(entry + COLUMN)
    if y is not None:
        base = tl.load(y + rows[:, None] * y_stride + first + columns[None, :], mask=mask, other=0.0)
        total = base.to(tl.float32) + tl.load(scales + piece) * total
        if d is not None:
            d_offset = tl.load(entry + D_START)
            own = tl.load(d + d_offset + columns, mask=inside & (d_offset >= 0), other=1.0)
            total *= own[None, :]
    at_out = out + rows[:, None] * out_stride + first + columns[None, :]
    tl.store(at_out, total.to(out.dtype.element_ty), mask=mask)


def launch_shrink(
    out: Tensor,
    x: Tensor,
    matrix: Tensor,
    d: Tensor | None,
    layout: Plan,
    num_slices: int,
    *,
    backward: bool,
    tiling: Tiling,
) -> None:
    shrink[len(layout.tiles), num_slices](
        out,
        x,
        matrix,
        d,
        layout.scales,
        layout.table,
        layout.tiles,
        num_slices,
        out.stride(0),
        x.stride(0),
        IN_FEATURES=x.shape[1],
        BACKWARD=backward,
        TOKENS=tiling.tokens,
        RANKS=tiling.ranks,
        DEPTH=tiling.depth,
        PRECISION=precision(x),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )


def launch_expand(
    out: Tensor,
    shrunk: Tensor,
    matrix: Tensor,
    sizes: tuple[Tensor, Tensor, int, int],
    tiling: Tiling,
    *,
    y: Tensor | None = None,
    d: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    table, tiles, num_slices, max_width = sizes
    expand[len(tiles), triton.cdiv(max_width, tiling.columns), num_slices](
        out,
        shrunk,
        matrix,
        y,
        d,
        scales,
        table,
        tiles,
        num_slices,
        out.stride(0),
        0 if y is None else y.stride(0),
        shrunk.stride(0),
        IN_FEATURES=out.shape[1],
        TOKENS=tiling.tokens,
        RANKS=tiling.ranks,
        COLUMNS=tiling.columns,
        PRECISION=precision(out),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
