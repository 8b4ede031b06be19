"""Causal attention over a paged cache on CUDA in Triton: decode and chunked prefill are one kernel.

One program computes one query tile and one KV head; its rows are the tile's tokens times the heads that share the KV
head. It walks the blocks of its sequence in the reference's order, by the same online softmax, and leaves out the
blocks that the reference leaves out. There is one split: the order of addition of a row depends on its position and
the window alone.

Knows tensors that passed the op's checks. Nothing here has been timed on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorasrv_kernels.attention.batch import BLOCK_TOKENS

NUM_WARPS = 4
"""Untuned, as is the number of stages: nothing has been measured on a GPU yet."""

NUM_STAGES = 2

MIN_ROWS = 16
"""Fewest rows of a product on a tensor core."""


def paged_attention(
    q: Tensor, cache: Tensor, block_tables: Tensor, tiles: Tensor, tile_tokens: int, scale: float, window: int
) -> Tensor:
    """See `lorasrv_kernels.attention.paged_attention`; a tile of no tokens costs nothing and writes nothing."""
    # contiguous, whatever the strides of q
    result = q.new_empty(q.shape)
    num_heads, head_size = q.shape[1:]
    num_kv_heads = cache.shape[2]
    if not len(tiles) or not q.numel():
        return result
    group = num_heads // num_kv_heads
    _attention_kernel[(len(tiles), num_kv_heads)](
        q,
        cache,
        block_tables,
        tiles,
        result,
        scale,
        window,
        *q.stride(),
        *cache.stride(),
        block_tables.stride(0),
        num_heads,
        GROUP=group,
        ROWS=max(MIN_ROWS, triton.next_power_of_2(tile_tokens * group)),
        HEAD_SIZE=head_size,
        WIDTH=max(16, triton.next_power_of_2(head_size)),
        BLOCK=BLOCK_TOKENS,
        WINDOWED=window > 0,
        # the interpreter, which alone runs on CPU tensors, computes nonsense in bf16
        FP32=q.dtype == torch.float32 or q.device.type == "cpu",
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return result


@triton.jit(do_not_specialize=["table_row"])
def _attention_kernel(
    q,  # [T, H, D]
    cache,  # [P, 2, Hkv, BLOCK, D]
    block_tables,  # [N, P] int32
    tiles,  # [K, 4] int32
    out,  # [T, H, D] contiguous
    scale,
    window,
    q_token,
    q_head,
    q_lane,
    cache_block,
    cache_part,
    cache_head,
    cache_token,
    cache_lane,
    table_row,
    num_heads,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOWED: tl.constexpr,
    FP32: tl.constexpr,
):
    tile = tiles + tl.program_id(0) * 4
    kv_head = tl.program_id(1)
    sequence = tl.load(tile)
    first_row = tl.load(tile + 1)
    num_tokens = tl.load(tile + 2)
    first_position = tl.load(tile + 3)
    end = first_position + num_tokens
    row = tl.arange(0, ROWS)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    lane = tl.arange(0, WIDTH)
    inside = (token < num_tokens)[:, None] & (lane < HEAD_SIZE)[None, :]
    token_row = (first_row + token).to(tl.int64)
    queries = tl.load(
        q + token_row[:, None] * q_token + head[:, None] * q_head + lane[None, :] * q_lane, mask=inside, other=0.0
    )
    if FP32:
        queries = queries.to(tl.float32)
    # rows of no token stand at the first position, so that no row is without a key
    limit = first_position + tl.where(token < num_tokens, token, 0)
    start = 0
    if WINDOWED:
        start = tl.maximum(first_position - window + 1, 0) // BLOCK
    step = tl.arange(0, BLOCK)
    table = block_tables + sequence.to(tl.int64) * table_row
    keys = cache + kv_head.to(tl.int64) * cache_head + step[:, None] * cache_token + lane[None, :] * cache_lane
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for index in range(start, (end + BLOCK - 1) // BLOCK):
        block = tl.load(table + index).to(tl.int64) * cache_block
        position = index * BLOCK + step
        # positions past the tile's end were never written, and 0 * NaN is NaN
        written = (position < end)[:, None] & (lane < HEAD_SIZE)[None, :]
        k = tl.load(keys + block, mask=written, other=0.0)
        v = tl.load(keys + block + cache_part, mask=written, other=0.0)
        if FP32:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        seen = position[None, :] <= limit[:, None]
        if WINDOWED:
            seen = seen & (position[None, :] > limit[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # a row that has seen nothing yet stays as it began: exp(-inf) is 0, exp(-inf - -inf) would be NaN
        origin = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(scores - origin[:, None])
        decay = tl.exp(top - origin)
        total = total * decay + tl.sum(weights, 1)
        sums = tl.dot(weights.to(v.dtype), v, sums * decay[:, None], input_precision="ieee")
        top = new_top
    place = (token_row * num_heads + head)[:, None] * HEAD_SIZE + lane[None, :]
    # only a tile of no tokens has seen nothing
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(out + place, (sums / total[:, None]).to(out.dtype.element_ty), mask=inside)
