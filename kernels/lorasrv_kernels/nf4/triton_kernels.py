"""NF4 on CUDA in Triton: rows back to floats, and the linear layer, on bitsandbytes' own bytes.

    y^T [O, T] = even codes x even columns of x^T + odd codes x odd columns of x^T

A byte holds two neighbouring weights, the earlier one in the high nibble; the even and the odd columns are multiplied
apart, so that no weight has to move. Per row and block of 64 the 16 levels are scaled and rounded once, as the
reference rounds them, and the codes choose among them: the weights are the reference's own bits. Requires I % 64 == 0,
so that no block lies in two rows.

Knows tensors that passed the op's checks. Nothing here has been timed on a GPU.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorasrv_kernels.nf4.codes import BLOCK_SIZE, NESTED_BLOCK_SIZE, levels, nested_codes
from lorasrv_kernels.nf4.container import slice_starts
from lorasrv_kernels.nf4.gradient import linear_grad_by_columns

MAX_FUSED_TOKENS = 64
"""Up to so many token rows the product reads the codes themselves; beyond, if a row's bits may then differ, dequantized
chunks go to the library."""

MAX_PLANE_TOKENS = 512
"""Most token rows whose sums over splits are kept at a time."""

CHUNK_BYTES = 24 << 20
"""Most bytes of dequantized weights at a time, or one row; chosen to stay in the 50 MB of an H100's L2."""

TILE_TOKENS = 16
"""Token rows of one product, for every number of tokens: one shape of product, one order of addition."""

DEQUANTIZE_BLOCKS = 32
"""Blocks of 64 weights that one program of the dequantization writes."""

REDUCE_ELEMENTS = 1024
"""Results that one program of the sum over splits writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """How the product over one weight is cut. It depends on O and I alone, and with it the order of addition."""

    block_rows: int = 64
    """Rows of the weight of one program."""
    block_columns: int = 128
    """Columns of the weight of one step, whole blocks of 64."""
    splits: int
    """Programs among which the columns are divided; their sums are added in order."""
    num_warps: int = 4
    num_stages: int = 3


# untuned: nothing has been measured on a GPU yet. Few rows need more splits to occupy about 264 programs, two on each
# of an H100's processors; the number does not follow the device, so that results do not either.
TILINGS = (
    # (rows of the weight up to, tiling)
    (2048, Tiling(splits=8)),
    (8192, Tiling(splits=4)),
    (16384, Tiling(splits=2)),
    (1 << 62, Tiling(splits=1)),
)


@functools.cache
def tiling(out_features: int, in_features: int) -> Tiling:
    """The tiling of a weight [O, I]; every split has something to do."""
    chosen = next(tiling for rows, tiling in TILINGS if out_features <= rows)
    steps = triton.cdiv(in_features, chosen.block_columns)
    steps_of_split = triton.cdiv(steps, min(chosen.splits, steps))
    return replace(chosen, splits=triton.cdiv(steps, steps_of_split))


@functools.lru_cache(maxsize=1024)
def slice_table(out_features: tuple[int, ...], in_features: int, device: torch.device) -> Tensor:
    """Per slice, its first block and what its blocks are ahead of their nested scales: [G, 2] int32.

    Block b has the nested scale (b - ahead) // 256, because nested blocks begin anew with each slice.
    """
    rows = [
        (start.block, start.block - start.nested * NESTED_BLOCK_SIZE)
        for start in slice_starts(out_features, in_features)[:-1]
    ]
    with torch.inference_mode(mode=False):
        return torch.tensor(rows, dtype=torch.int32, device=device)


def dequantize_(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    out_features: Sequence[int],
    in_features: int,
    start_row: int,
    out: Tensor,
) -> None:
    """Writes the rows from `start_row` on into out [rows, I], with the reference's own bits."""
    num_blocks = out.numel() // BLOCK_SIZE
    if not num_blocks:
        return
    _dequantize_kernel[(triton.cdiv(num_blocks, DEQUANTIZE_BLOCKS),)](
        packed,
        absmax,
        nested_absmax,
        offset,
        slice_table(tuple(out_features), in_features, out.device),
        levels(out.device),
        nested_codes(out.device),
        out,
        start_row * (in_features // BLOCK_SIZE),
        num_blocks,
        SLICES=len(out_features),
        NESTED=NESTED_BLOCK_SIZE,
        BLOCKS=DEQUANTIZE_BLOCKS,
        num_warps=4,
        # the reference rounds a scale's product before it adds the offset
        enable_fp_fusion=False,
    )


def dequantize_columns_(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    out_features: Sequence[int],
    in_features: int,
    start_column: int,
    out: Tensor,
) -> None:
    """Writes the columns from `start_column` on into out [O, columns], both multiples of 64."""
    num_blocks = out.numel() // BLOCK_SIZE
    if not num_blocks:
        return
    _dequantize_columns_kernel[(triton.cdiv(num_blocks, DEQUANTIZE_BLOCKS),)](
        packed,
        absmax,
        nested_absmax,
        offset,
        slice_table(tuple(out_features), in_features, out.device),
        levels(out.device),
        nested_codes(out.device),
        out,
        start_column // BLOCK_SIZE,
        num_blocks,
        out.shape[1] // BLOCK_SIZE,
        SLICES=len(out_features),
        NESTED=NESTED_BLOCK_SIZE,
        ROW_BLOCKS=in_features // BLOCK_SIZE,
        BLOCKS=DEQUANTIZE_BLOCKS,
        num_warps=4,
        enable_fp_fusion=False,
    )


def linear_grad(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    out_features: Sequence[int],
    in_features: int,
) -> Tensor:
    """grad W [T, I] of grad [T, O]."""
    storage = (packed, absmax, nested_absmax, offset, out_features, in_features)
    return linear_grad_by_columns(grad, *storage, dequantize_columns=dequantize_columns_, panel_bytes=CHUNK_BYTES)


def linear_(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    out_features: Sequence[int],
    out: Tensor,
    exact: bool = True,
) -> None:
    """Writes x W^T into out [T, O]; x [T, I] contiguous."""
    num_tokens, num_rows = out.shape
    if not num_tokens or not num_rows:
        return
    if exact or num_tokens <= MAX_FUSED_TOKENS:
        for row in range(0, num_tokens, MAX_PLANE_TOKENS):
            rows = slice(row, row + MAX_PLANE_TOKENS)
            _fused_linear_(x[rows], packed, absmax, nested_absmax, offset, tuple(out_features), out[rows])
        return
    in_features = x.shape[1]
    step = max(1, min(num_rows, CHUNK_BYTES // (in_features * x.element_size())))
    chunk = x.new_empty(step, in_features)
    for row in range(0, num_rows, step):
        weights = chunk[: min(step, num_rows - row)]
        dequantize_(packed, absmax, nested_absmax, offset, out_features, in_features, row, weights)
        torch.mm(x, weights.T, out=out[:, row : row + step])


def _fused_linear_(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    out_features: tuple[int, ...],
    out: Tensor,
) -> None:
    num_tokens, num_rows = out.shape
    in_features = x.shape[1]
    cut = tiling(num_rows, in_features)
    # one plane of sums per split; a fresh tensor, so that a captured graph owns it
    planes = out if cut.splits == 1 else x.new_empty(cut.splits, num_tokens, num_rows, dtype=torch.float32)
    fp32 = x.dtype == torch.float32
    # sums of several tiles of float32 products do not fit the registers
    tiles = 1 if fp32 else min(4, triton.next_power_of_2(triton.cdiv(num_tokens, TILE_TOKENS)))
    _linear_kernel[(triton.cdiv(num_rows, cut.block_rows), cut.splits, triton.cdiv(num_tokens, tiles * TILE_TOKENS))](
        x,
        packed,
        absmax,
        nested_absmax,
        offset,
        slice_table(out_features, in_features, x.device),
        levels(x.device),
        nested_codes(x.device),
        planes,
        num_tokens,
        num_rows,
        IN_FEATURES=in_features,
        SLICES=len(out_features),
        NESTED=NESTED_BLOCK_SIZE,
        SPLITS=cut.splits,
        ROWS=cut.block_rows,
        COLUMNS=cut.block_columns,
        TILE=TILE_TOKENS,
        TILES=tiles,
        # the interpreter, which alone runs on CPU tensors, computes nonsense in bf16
        FP32=fp32 or x.device.type == "cpu",
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
        enable_fp_fusion=False,
    )
    if cut.splits > 1:
        _sum_kernel[(triton.cdiv(out.numel(), REDUCE_ELEMENTS),)](
            planes, out, out.numel(), SPLITS=cut.splits, ELEMENTS=REDUCE_ELEMENTS, num_warps=4
        )


@triton.jit
def _slice_of(blocks, slices, offset, SLICES: tl.constexpr):
    """How far the blocks are ahead of their nested scales, and the offset of the slice they lie in."""
    ahead = tl.zeros_like(blocks)
    mean = tl.zeros_like(blocks).to(tl.float32) + tl.load(offset)
    for index in tl.static_range(1, SLICES):
        inside = blocks >= tl.load(slices + 2 * index)
        ahead = tl.where(inside, tl.load(slices + 2 * index + 1), ahead)
        mean = tl.where(inside, tl.load(offset + index), mean)
    return ahead, mean


@triton.jit(do_not_specialize=["first_block", "num_blocks"])
def _dequantize_kernel(
    packed,  # [bytes] uint8
    absmax,  # [blocks] uint8
    nested_absmax,  # [nested blocks] float32
    offset,  # [SLICES] float32
    slices,  # [SLICES, 2] int32
    levels,  # [16] float32
    nested_codes,  # [256] float32
    out,  # [num_blocks * 64]
    first_block,
    num_blocks,
    SLICES: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program writes BLOCKS blocks of 64 weights."""
    local = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    storage = (packed, absmax, nested_absmax, offset, slices, levels, nested_codes)
    _dequantize_blocks(storage, local, local + first_block, local < num_blocks, out, SLICES, NESTED)


@triton.jit(do_not_specialize=["first_block", "num_blocks"])
def _dequantize_columns_kernel(
    packed,  # [bytes] uint8
    absmax,  # [blocks] uint8
    nested_absmax,  # [nested blocks] float32
    offset,  # [SLICES] float32
    slices,  # [SLICES, 2] int32
    levels,  # [16] float32
    nested_codes,  # [256] float32
    out,  # [num_blocks * 64], WIDTH blocks of each row
    first_block,
    num_blocks,
    width,
    SLICES: tl.constexpr,
    NESTED: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The same for `width` blocks of each row, the first row's from `first_block` on."""
    local = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    blocks = local // width * ROW_BLOCKS + local % width + first_block
    storage = (packed, absmax, nested_absmax, offset, slices, levels, nested_codes)
    _dequantize_blocks(storage, local, blocks, local < num_blocks, out, SLICES, NESTED)


@triton.jit
def _dequantize_blocks(storage, local, blocks, valid, out, SLICES: tl.constexpr, NESTED: tl.constexpr):
    """Writes the blocks to the places `local`, in blocks of 64."""
    packed, absmax, nested_absmax, offset, slices, levels, nested_codes = storage
    ahead, mean = _slice_of(blocks, slices, offset, SLICES)
    code = tl.load(absmax + blocks, mask=valid, other=0).to(tl.int32)
    wide = tl.load(nested_absmax + (blocks - ahead) // NESTED, mask=valid, other=0.0)
    scale = tl.load(nested_codes + code) * wide + mean
    byte = blocks.to(tl.int64)[:, None] * 32 + tl.arange(0, 32)[None, :]
    codes = tl.load(packed + byte, mask=valid[:, None], other=0).to(tl.int32)
    even = tl.load(levels + (codes >> 4)) * scale[:, None]
    odd = tl.load(levels + (codes & 15)) * scale[:, None]
    weights = tl.reshape(tl.join(even, odd), (local.shape[0], 64))
    place = local.to(tl.int64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + place, weights.to(out.dtype.element_ty), mask=valid[:, None])


@triton.jit
def _add_products(
    sums,  # [ROWS, TILE] float32
    even,  # [ROWS, COLUMNS / 2]
    odd,
    x,
    tokens,  # [TILE]
    num_tokens,
    column,
    IN_FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    FP32: tl.constexpr,
):
    """Adds the products of one step with one tile of token rows."""
    columns = column + tl.arange(0, COLUMNS)
    inside = (tokens < num_tokens)[:, None] & (columns < IN_FEATURES)[None, :]
    part = tl.load(x + tokens.to(tl.int64)[:, None] * IN_FEATURES + columns[None, :], mask=inside, other=0.0)
    if FP32:
        part = part.to(tl.float32)
    x_even, x_odd = tl.split(tl.reshape(part, (part.shape[0], COLUMNS // 2, 2)))
    sums = tl.dot(even, tl.trans(x_even), sums, input_precision="ieee")
    return tl.dot(odd, tl.trans(x_odd), sums, input_precision="ieee")


@triton.jit
def _store_sums(sums, planes, rows, tokens, num_tokens, num_rows, split):
    place = (split * num_tokens + tokens).to(tl.int64)[None, :] * num_rows + rows[:, None]
    inside = (rows < num_rows)[:, None] & (tokens < num_tokens)[None, :]
    tl.store(planes + place, sums.to(planes.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _linear_kernel(
    x,  # [T, I]
    packed,  # [bytes] uint8
    absmax,  # [blocks] uint8
    nested_absmax,  # [nested blocks] float32
    offset,  # [SLICES] float32
    slices,  # [SLICES, 2] int32
    levels,  # [16] float32
    nested_codes,  # [256] float32
    planes,  # [SPLITS, T, O] float32, or [T, O] in the dtype of x if there is one split
    num_tokens,
    num_rows,
    IN_FEATURES: tl.constexpr,
    SLICES: tl.constexpr,
    NESTED: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    FP32: tl.constexpr,
):
    """One program: ROWS rows of the weight, its split of the columns, 1, 2 or 4 tiles of token rows."""
    BLOCKS: tl.constexpr = COLUMNS // 64
    STEPS: tl.constexpr = (IN_FEATURES + COLUMNS - 1) // COLUMNS
    STEPS_OF_SPLIT: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    split = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < num_rows
    # rows beyond the end read the last one's bytes and are not stored
    safe = tl.minimum(rows, num_rows - 1)
    first_of_row = safe * (IN_FEATURES // 64)
    ahead, mean = _slice_of(first_of_row, slices, offset, SLICES)
    row_bytes = packed + safe.to(tl.int64)[:, None] * (IN_FEATURES // 2)
    level = tl.load(levels + tl.arange(0, 16))
    tokens = tl.program_id(2) * TILES * TILE + tl.arange(0, TILE)
    sums0 = tl.zeros((ROWS, TILE), tl.float32)
    sums1 = sums0
    sums2 = sums0
    sums3 = sums0
    for step in range(split * STEPS_OF_SPLIT, tl.minimum((split + 1) * STEPS_OF_SPLIT, STEPS)):
        column = step * COLUMNS
        byte = column // 2 + tl.arange(0, COLUMNS // 2)
        codes = tl.load(row_bytes + byte[None, :], mask=(byte < IN_FEATURES // 2)[None, :], other=0).to(tl.int32)
        block_of_row = column // 64 + tl.arange(0, BLOCKS)
        blocks = first_of_row[:, None] + block_of_row[None, :]
        inside = valid[:, None] & (block_of_row < IN_FEATURES // 64)[None, :]
        code = tl.load(absmax + blocks, mask=inside, other=0).to(tl.int32)
        place = (blocks - ahead[:, None]) // NESTED
        scale = tl.load(nested_codes + code) * tl.load(nested_absmax + place, mask=inside, other=0.0) + mean[:, None]
        table = (level[None, None, :] * scale[:, :, None]).to(x.dtype.element_ty)
        table = tl.reshape(table, (ROWS * BLOCKS, 16))
        codes = tl.reshape(codes, (ROWS * BLOCKS, 32))
        even = tl.reshape(tl.gather(table, codes >> 4, 1), (ROWS, COLUMNS // 2))
        odd = tl.reshape(tl.gather(table, codes & 15, 1), (ROWS, COLUMNS // 2))
        if FP32:
            even = even.to(tl.float32)
            odd = odd.to(tl.float32)
        sums0 = _add_products(sums0, even, odd, x, tokens, num_tokens, column, IN_FEATURES, COLUMNS, FP32)
        if TILES > 1:
            sums1 = _add_products(sums1, even, odd, x, TILE + tokens, num_tokens, column, IN_FEATURES, COLUMNS, FP32)
        if TILES > 2:
            third = 2 * TILE + tokens
            sums2 = _add_products(sums2, even, odd, x, third, num_tokens, column, IN_FEATURES, COLUMNS, FP32)
            fourth = 3 * TILE + tokens
            sums3 = _add_products(sums3, even, odd, x, fourth, num_tokens, column, IN_FEATURES, COLUMNS, FP32)
    _store_sums(sums0, planes, rows, tokens, num_tokens, num_rows, split)
    if TILES > 1:
        _store_sums(sums1, planes, rows, TILE + tokens, num_tokens, num_rows, split)
    if TILES > 2:
        _store_sums(sums2, planes, rows, 2 * TILE + tokens, num_tokens, num_rows, split)
        _store_sums(sums3, planes, rows, 3 * TILE + tokens, num_tokens, num_rows, split)


@triton.jit(do_not_specialize=["count"])
def _sum_kernel(planes, out, count, SPLITS: tl.constexpr, ELEMENTS: tl.constexpr):
    """Adds the planes [SPLITS, count] in order."""
    place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = place < count
    total = tl.load(planes + place, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(planes + split * count.to(tl.int64) + place, mask=inside, other=0.0)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)
