"""Causal attention over a paged cache on CUDA in Triton: decode and chunked prefill are one kernel.

One program computes one query tile and one KV head; its rows are the tile's tokens times the heads that share the KV
head. It walks the blocks of its sequence in the reference's order, by the same online softmax, and leaves out the
blocks that the reference leaves out.

The blocks of a sequence are cut into splits of a fixed length from position 0 on. Each split has a softmax of its own,
and they are merged in order: by the program that walked them, or, where a step has too few tiles to occupy a GPU, by a
second kernel over splits that were walked side by side. Both do the same arithmetic, so the order of addition of a row
depends on its position and the window alone.

Knows tensors that passed the op's checks. Nothing here has been timed on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorasrv_kernels.attention.batch import BLOCK_TOKENS
from lorasrv_kernels.attention.reference import PagedAttention, StoreKv

NUM_WARPS = 4
"""Untuned, as are the numbers below: nothing has been measured on a GPU yet."""

NUM_STAGES = 2

ENOUGH_PROGRAMS = 264
"""Tiles times KV heads from which on a program walks all splits itself: two on each of an H100's processors."""

MERGED_AT_ONCE = 4
"""Splits that the second kernel loads before it needs the first."""

STORED_ELEMENTS = 1024
"""Keys, and values, that a program stores at a time."""

MIN_ROWS = 16
"""Fewest rows of a product on a tensor core."""


def store_kv_(call: StoreKv) -> None:
    """See `lorasrv_kernels.attention.store_kv_`."""
    cache, k, v, slot_mapping = call
    num_tokens, num_kv_heads, head_size = k.shape
    if not k.numel():
        return
    _store_kernel[(num_tokens, triton.cdiv(num_kv_heads * head_size, STORED_ELEMENTS))](
        cache,
        k,
        v,
        slot_mapping,
        *cache.stride(),
        *k.stride(),
        *v.stride(),
        slot_mapping.stride(0),
        HEADS=num_kv_heads,
        HEAD_SIZE=head_size,
        BLOCK=BLOCK_TOKENS,
        ELEMENTS=STORED_ELEMENTS,
        num_warps=NUM_WARPS,
    )


def paged_attention(call: PagedAttention) -> Tensor:
    """See `lorasrv_kernels.attention.paged_attention`; a tile of no tokens costs nothing and writes nothing."""
    q, cache, block_tables, tiles, tile_tokens, scale, window, split_blocks = call
    # contiguous, whatever the strides of q
    result = q.new_empty(q.shape)
    num_heads, head_size = q.shape[1:]
    num_kv_heads = cache.shape[2]
    if not len(tiles) or not q.numel():
        return result
    group = num_heads // num_kv_heads
    width = max(16, triton.next_power_of_2(head_size))
    splits = triton.cdiv(block_tables.shape[1], split_blocks)
    apart = splits > 1 and len(tiles) * num_kv_heads < ENOUGH_PROGRAMS
    # fresh tensors, so that a captured graph owns them
    sums = q.new_empty((len(q), num_heads, splits, head_size), dtype=torch.float32) if apart else result
    tops = q.new_empty((2, len(q), num_heads, splits), dtype=torch.float32) if apart else result
    _attention_kernel[(len(tiles), num_kv_heads, splits if apart else 1)](
        q,
        cache,
        block_tables,
        tiles,
        sums,
        tops,
        scale,
        window,
        *q.stride(),
        *cache.stride(),
        block_tables.stride(0),
        len(q),
        num_heads,
        splits,
        GROUP=group,
        ROWS=max(MIN_ROWS, triton.next_power_of_2(tile_tokens * group)),
        HEAD_SIZE=head_size,
        WIDTH=width,
        BLOCK=BLOCK_TOKENS,
        SPLIT_BLOCKS=split_blocks,
        APART=apart,
        MERGES=splits > 1,
        WINDOWED=window > 0,
        # the interpreter, which alone runs on CPU tensors, computes nonsense in bf16
        FP32=q.dtype == torch.float32 or q.device.type == "cpu",
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
        # what one kernel merges must have the bits of what the other merges
        enable_fp_fusion=False,
    )
    if apart:
        _merge_kernel[(len(tiles), tile_tokens * num_heads)](
            sums,
            tops,
            tiles,
            result,
            window,
            len(q),
            num_heads,
            splits,
            HEAD_SIZE=head_size,
            WIDTH=width,
            SPLIT_TOKENS=split_blocks * BLOCK_TOKENS,
            AT_ONCE=MERGED_AT_ONCE,
            WINDOWED=window > 0,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return result


@triton.jit
def _store_kernel(
    cache,  # [P, 2, Hkv, BLOCK, D]
    k,  # [T, Hkv, D]
    v,
    slot_mapping,  # [T] int64
    cache_block,
    cache_part,
    cache_head,
    cache_token,
    cache_lane,
    k_token,
    k_head,
    k_lane,
    v_token,
    v_head,
    v_lane,
    slot_stride,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token * slot_stride)
    if slot < 0:
        return
    element = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    head = element // HEAD_SIZE
    lane = element % HEAD_SIZE
    inside = element < HEADS * HEAD_SIZE
    place = cache + slot // BLOCK * cache_block + slot % BLOCK * cache_token
    place += head.to(tl.int64) * cache_head + lane * cache_lane
    key = tl.load(k + token * k_token + head * k_head + lane * k_lane, mask=inside)
    value = tl.load(v + token * v_token + head * v_head + lane * v_lane, mask=inside)
    tl.store(place, key, mask=inside)
    tl.store(place + cache_part, value, mask=inside)


@triton.jit
def _merged(top, total, sums, other_top, other_total, other_sums):
    """The softmax over two sets of keys; one that was not seen at all (top -inf, the rest 0) changes no bit."""
    new_top = tl.maximum(top, other_top)
    # exp(-inf) is 0, exp(-inf - -inf) would be NaN
    origin = tl.where(new_top == float("-inf"), 0.0, new_top)
    decay = tl.exp(top - origin)
    other_decay = tl.exp(other_top - origin)
    total = total * decay + other_total * other_decay
    sums = sums * tl.expand_dims(decay, -1) + other_sums * tl.expand_dims(other_decay, -1)
    return new_top, total, sums


@triton.jit(do_not_specialize=["table_row", "num_rows", "splits"])
def _attention_kernel(
    q,  # [T, H, D]
    cache,  # [P, 2, Hkv, BLOCK, D]
    block_tables,  # [N, P] int32
    tiles,  # [K, 4] int32
    out,  # [T, H, D] contiguous; [T, H, splits, D] float32 if the splits stay apart
    tops,  # [2, T, H, splits] float32 if they do: the largest score, the sum of weights
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
    num_rows,
    num_heads,
    splits,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT_BLOCKS: tl.constexpr,
    APART: tl.constexpr,
    MERGES: tl.constexpr,
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
    start = 0
    if WINDOWED:
        start = tl.maximum(first_position - window + 1, 0) // BLOCK
    stop = (end + BLOCK - 1) // BLOCK
    if APART:
        split = tl.program_id(2)
        start = tl.maximum(start, split * SPLIT_BLOCKS)
        stop = tl.minimum(stop, (split + 1) * SPLIT_BLOCKS)
        if (num_tokens == 0) | (start >= stop):
            return
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
    step = tl.arange(0, BLOCK)
    table = block_tables + sequence.to(tl.int64) * table_row
    keys = cache + kv_head.to(tl.int64) * cache_head + step[:, None] * cache_token + lane[None, :] * cache_lane
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    # of the splits before this one
    merged_top = top
    merged_total = total
    merged_sums = sums
    for index in range(start, stop):
        begins_split = False
        if MERGES and not APART:
            begins_split = index % SPLIT_BLOCKS == 0
        if begins_split:
            merged_top, merged_total, merged_sums = _merged(merged_top, merged_total, merged_sums, top, total, sums)
            top = tl.full((ROWS,), float("-inf"), tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            sums = tl.zeros((ROWS, WIDTH), tl.float32)
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
    place = token_row * num_heads + head
    if APART:
        place = place * splits + split
        here = token < num_tokens
        tl.store(tops + place, top, mask=here)
        tl.store(tops + num_rows.to(tl.int64) * num_heads * splits + place, total, mask=here)
    else:
        if MERGES:
            top, total, sums = _merged(merged_top, merged_total, merged_sums, top, total, sums)
        # only a tile of no tokens has seen nothing
        total = tl.where(total == 0.0, 1.0, total)
        sums = sums / total[:, None]
    tl.store(out + place[:, None] * HEAD_SIZE + lane[None, :], sums.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "splits"])
def _merge_kernel(
    sums,  # [T, H, splits, D] float32
    tops,  # [2, T, H, splits] float32
    tiles,  # [K, 4] int32
    out,  # [T, H, D] contiguous
    window,
    num_rows,
    num_heads,
    splits,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """One token and head of a tile: merges the splits that the tile has walked, in order."""
    tile = tiles + tl.program_id(0) * 4
    token = tl.program_id(1) // num_heads
    head = tl.program_id(1) % num_heads
    num_tokens = tl.load(tile + 2)
    if token >= num_tokens:
        return
    first_position = tl.load(tile + 3)
    start = 0
    if WINDOWED:
        start = tl.maximum(first_position - window + 1, 0) // SPLIT_TOKENS
    stop = (first_position + num_tokens + SPLIT_TOKENS - 1) // SPLIT_TOKENS
    row = (tl.load(tile + 1) + token).to(tl.int64) * num_heads + head
    lane = tl.arange(0, WIDTH)
    # numbers of one row are tensors of one row, so that both kernels merge by one function
    only = tl.arange(0, 1)
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    merged = tl.zeros((1, WIDTH), tl.float32)
    totals = tops + num_rows.to(tl.int64) * num_heads * splits
    for first in range(start, stop, AT_ONCE):
        for step in tl.static_range(AT_ONCE):
            split = first + step
            place = row * splits + split
            walked = only + split < stop
            inside = walked[:, None] & (lane < HEAD_SIZE)[None, :]
            other_top = tl.load(tops + place + only, mask=walked, other=float("-inf"))
            other_total = tl.load(totals + place + only, mask=walked, other=0.0)
            other_sums = tl.load(sums + place * HEAD_SIZE + lane[None, :], mask=inside, other=0.0)
            top, total, merged = _merged(top, total, merged, other_top, other_total, other_sums)
    result = (merged / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + row * HEAD_SIZE + lane[None, :], result, mask=(lane < HEAD_SIZE)[None, :])
