"""NF4 on CUDA in Triton: rows, or columns of rows, back to floats with the reference's own bits.

Knows tensors that passed the op's checks. Nothing here has been timed on a GPU.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorasrv_kernels.nf4.calls import Nf4Dequantize, Nf4DequantizeColumns
from lorasrv_kernels.nf4.codes import BLOCK_SIZE, NESTED_BLOCK_SIZE, levels, nested_codes
from lorasrv_kernels.nf4.container import slice_starts

DEQUANTIZE_BLOCKS = 32
"""Blocks of 64 weights that one program of the dequantization writes."""


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


def dequantize_(call: Nf4Dequantize) -> None:
    """Writes the rows from `start_row` on into out [rows, I], with the reference's own bits."""
    packed, absmax, nested_absmax, offset, out_features, in_features, start_row, out = call
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


def dequantize_columns_(call: Nf4DequantizeColumns) -> None:
    """Writes the columns from `start_column` on into out [O, columns], with the reference's own bits."""
    packed, absmax, nested_absmax, offset, out_features, in_features, start_column, out = call
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


@triton.jit
def slice_of(blocks, slices, offset, SLICES: tl.constexpr):
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
    ahead, mean = slice_of(blocks, slices, offset, SLICES)
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
