"""NF4 on CUDA in Triton: the product of a few token rows with a weight, on bitsandbytes' own bytes.

    y^T [O, T] = even codes x even columns of x^T + odd codes x odd columns of x^T

A byte holds two neighbouring weights, the earlier one in the high nibble; the even and the odd columns are multiplied
apart, so that no weight has to move. Per row and block of 64 the 16 levels are scaled and rounded once, as the
reference rounds them, and the codes choose among them (`triton_lookup`): the weights are the reference's own bits.

Knows tensors that passed the op's checks. Nothing here has been timed on a GPU.
"""

import functools
from dataclasses import dataclass, replace
from typing import Literal

import torch
import triton
import triton.language as tl

from lorasrv_kernels.nf4.calls import Nf4LinearInto
from lorasrv_kernels.nf4.codes import NESTED_BLOCK_SIZE, levels, nested_codes
from lorasrv_kernels.nf4.triton_dequantize import slice_of, slice_table
from lorasrv_kernels.nf4.triton_lookup import in_order_of_threads, weights_by_gather, weights_by_words

TILE_TOKENS = 16
"""Token rows of one product, for every number of tokens: one shape of product, one order of addition."""

REDUCE_ELEMENTS = 1024
"""Results that one program of the sum over splits writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """How the product over one weight is cut. It depends on O and I alone, and with it the order of addition."""

    block_rows: int = 64
    """Rows of the weight of one program."""
    block_columns: int = 256
    """Columns of the weight of one step, whole blocks of 64. At 256 a thread has all codes of a block, so that it makes
    few tables of levels."""
    splits: int
    """Programs among which the columns are divided; their sums are added in order."""
    num_warps: int = 4
    num_stages: int = 3
    lookup: Literal["gather", "prmt"] = "prmt"
    """How codes choose levels (`triton_lookup`), where 16 bits are multiplied on a device."""


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
def tiling(out_features: int, in_features: int, dtype: torch.dtype) -> Tiling:
    """The tiling of a weight [O, I] that meets x of a dtype; every split has something to do."""
    chosen = next(tiling for rows, tiling in TILINGS if out_features <= rows)
    if dtype == torch.float32:
        # more numbers of 32 bits than this do not fit the registers, nor does a table of 16-bit levels
        chosen = replace(chosen, block_columns=min(128, chosen.block_columns), lookup="gather")
    steps = triton.cdiv(in_features, chosen.block_columns)
    steps_of_split = triton.cdiv(steps, min(chosen.splits, steps))
    return replace(chosen, splits=triton.cdiv(steps, steps_of_split))


@functools.cache
def most_tiles(device: torch.device) -> int:
    """Tiles of token rows that one program multiplies at most; changes no bit."""
    # before compute capability 9.0 the sums of four do not fit the registers
    return 4 if device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0) else 2


def fused_linear_(call: Nf4LinearInto) -> None:
    """Writes x W^T into out [T, O]; x [T, I] contiguous. The order of addition follows O, I and the dtype alone."""
    x, packed, absmax, nested_absmax, offset, out_features, out, _ = call
    num_tokens, num_rows = out.shape
    in_features = x.shape[1]
    cut = tiling(num_rows, in_features, x.dtype)
    # one plane of sums per split; a fresh tensor, so that a captured graph owns it
    planes = out if cut.splits == 1 else x.new_empty(cut.splits, num_tokens, num_rows, dtype=torch.float32)
    fp32 = x.dtype == torch.float32
    # sums of several tiles of float32 products do not fit the registers
    tiles = 1 if fp32 else min(most_tiles(x.device), triton.next_power_of_2(triton.cdiv(num_tokens, TILE_TOKENS)))
    # the interpreter, which alone runs on CPU tensors, knows no device's instructions, and computes nonsense in bf16
    interpreted = x.device.type == "cpu"
    lookup = "load" if interpreted and cut.lookup == "prmt" else cut.lookup
    if packed.storage_offset() % 4:
        # words of codes would not be aligned
        lookup = "gather"
    _linear_kernel[(triton.cdiv(num_rows, cut.block_rows), cut.splits, triton.cdiv(num_tokens, tiles * TILE_TOKENS))](
        x,
        packed,
        absmax,
        nested_absmax,
        offset,
        slice_table(tuple(out_features), in_features, x.device),
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
        FP32=fp32 or interpreted,
        LOOKUP=lookup,
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
        enable_fp_fusion=False,
    )
    if cut.splits > 1:
        _sum_kernel[(triton.cdiv(out.numel(), REDUCE_ELEMENTS),)](
            planes, out, out.numel(), SPLITS=cut.splits, ELEMENTS=REDUCE_ELEMENTS, num_warps=4
        )


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
    WORDS: tl.constexpr,
):
    """Adds the products of one step with one tile of token rows."""
    columns = column + tl.arange(0, COLUMNS)
    inside = (tokens < num_tokens)[:, None] & (columns < IN_FEATURES)[None, :]
    part = tl.load(x + tokens.to(tl.int64)[:, None] * IN_FEATURES + columns[None, :], mask=inside, other=0.0)
    if FP32:
        part = part.to(tl.float32)
    if WORDS:
        x_even, x_odd = in_order_of_threads(part, part.shape[0], COLUMNS)
    else:
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
    LOOKUP: tl.constexpr,
):
    """One program: ROWS rows of the weight, its split of the columns, 1, 2 or 4 tiles of token rows."""
    WORDS: tl.constexpr = LOOKUP != "gather"
    BLOCKS: tl.constexpr = COLUMNS // 64
    STEPS: tl.constexpr = (IN_FEATURES + COLUMNS - 1) // COLUMNS
    STEPS_OF_SPLIT: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    split = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < num_rows
    # rows beyond the end read the last one's bytes and are not stored
    safe = tl.minimum(rows, num_rows - 1)
    first_of_row = safe * (IN_FEATURES // 64)
    ahead, mean = slice_of(first_of_row, slices, offset, SLICES)
    row_bytes = packed + safe.to(tl.int64)[:, None] * (IN_FEATURES // 2)
    row_words = packed.to(tl.pointer_type(tl.int32)) + safe.to(tl.int64)[:, None] * (IN_FEATURES // 8)
    level = tl.load(levels + tl.arange(0, 16))
    tokens = tl.program_id(2) * TILES * TILE + tl.arange(0, TILE)
    sums0 = tl.zeros((ROWS, TILE), tl.float32)
    sums1 = sums0
    sums2 = sums0
    sums3 = sums0
    for step in range(split * STEPS_OF_SPLIT, tl.minimum((split + 1) * STEPS_OF_SPLIT, STEPS)):
        column = step * COLUMNS
        block_of_row = column // 64 + tl.arange(0, BLOCKS)
        blocks = first_of_row[:, None] + block_of_row[None, :]
        inside = valid[:, None] & (block_of_row < IN_FEATURES // 64)[None, :]
        code = tl.load(absmax + blocks, mask=inside, other=0).to(tl.int32)
        place = (blocks - ahead[:, None]) // NESTED
        scale = tl.load(nested_codes + code) * tl.load(nested_absmax + place, mask=inside, other=0.0) + mean[:, None]
        if WORDS:
            word = column // 8 + tl.arange(0, COLUMNS // 8)
            words = tl.load(row_words + word[None, :], mask=(word < IN_FEATURES // 8)[None, :], other=0)
            even, odd = weights_by_words(words, scale, levels, x.dtype.element_ty, ROWS, COLUMNS, LOOKUP == "prmt")
        else:
            byte = column // 2 + tl.arange(0, COLUMNS // 2)
            codes = tl.load(row_bytes + byte[None, :], mask=(byte < IN_FEATURES // 2)[None, :], other=0)
            even, odd = weights_by_gather(codes, scale, level, x.dtype.element_ty, ROWS, COLUMNS)
        if FP32:
            even = even.to(tl.float32)
            odd = odd.to(tl.float32)
        sums0 = _add_products(sums0, even, odd, x, tokens, num_tokens, column, IN_FEATURES, COLUMNS, FP32, WORDS)
        if TILES > 1:
            sums1 = _add_products(
                sums1, even, odd, x, TILE + tokens, num_tokens, column, IN_FEATURES, COLUMNS, FP32, WORDS
            )
        if TILES > 2:
            third = 2 * TILE + tokens
            sums2 = _add_products(sums2, even, odd, x, third, num_tokens, column, IN_FEATURES, COLUMNS, FP32, WORDS)
            fourth = 3 * TILE + tokens
            sums3 = _add_products(sums3, even, odd, x, fourth, num_tokens, column, IN_FEATURES, COLUMNS, FP32, WORDS)
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
