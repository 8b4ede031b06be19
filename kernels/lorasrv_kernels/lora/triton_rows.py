"""The low-rank update of a single token row in Triton, without tensor cores: every number of A and B^T is read once.

Device functions that the kernels of `triton_kernels` call for tiles of one row. Products and sums are in float32. Knows
where one row's numbers are; knows no table and no batch.
"""

import triton
import triton.language as tl


@triton.jit
def floats_of(arena, offset):
    """The float32 numbers at an offset of the arena."""
    return (arena + offset).to(tl.pointer_type(tl.float32))


@triton.jit
def shrink_row(
    out,
    x,
    x_column_stride,
    a,
    rank,
    first_feature,
    IN_FEATURES: tl.constexpr,
    PLANE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out [rank] <- A x over the features of one plane; x and A [rank, I] begin at their pointers."""
    for first_rank in range(0, rank, BLOCK_R):
        ranks = first_rank + tl.arange(0, BLOCK_R)
        known = ranks < rank
        total = tl.zeros((BLOCK_R, BLOCK_I), dtype=tl.float32)
        for step in tl.static_range(0, PLANE, BLOCK_I):
            local = step + tl.arange(0, BLOCK_I)
            features = first_feature + local
            inside = (features < IN_FEATURES) & (local < PLANE)
            x_block = tl.load(x + features.to(tl.int64) * x_column_stride, mask=inside, other=0.0)
            a_block = tl.load(
                a + ranks.to(tl.int64)[:, None] * IN_FEATURES + features[None, :],
                mask=known[:, None] & inside[None, :],
                other=0.0,
            )
            total += a_block.to(tl.float32) * x_block.to(tl.float32)[None, :]
        tl.store(out + ranks, tl.sum(total, 1), mask=known)


@triton.jit
def expand_row(
    shrunk,
    plane_stride,
    b_t,
    rank,
    width,
    columns,
    inside,
    PLANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """[BLOCK_O] float32: the columns of B^T [rank, width] times the sum of the planes of A x, [rank] each."""
    product = tl.zeros((BLOCK_O,), dtype=tl.float32)
    for first_rank in range(0, rank, BLOCK_R):
        ranks = first_rank + tl.arange(0, BLOCK_R)
        known = ranks < rank
        factors = tl.zeros((BLOCK_R,), dtype=tl.float32)
        for plane in tl.static_range(PLANES):
            factors += tl.load(shrunk + plane * plane_stride + ranks, mask=known, other=0.0).to(tl.float32)
        b_block = tl.load(
            b_t + ranks.to(tl.int64)[:, None] * width + columns[None, :],
            mask=known[:, None] & inside[None, :],
            other=0.0,
        )
        product += tl.sum(factors[:, None] * b_block.to(tl.float32), 0)
    return product
