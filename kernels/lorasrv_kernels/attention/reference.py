"""The specification of causal attention over a paged cache, in float32.

Each query walks the KV blocks of its sequence from position 0 in steps of `BLOCK_TOKENS` with the online softmax
(Milakov and Gimelshein 2018, algorithm 3). A block after a query changes nothing in it, bit for bit, so that decode,
prefill and every way of chunking give the same row. Tiles have a fixed number of rows for the same reason.
"""

import torch
from torch import Tensor

from lorasrv_kernels.attention.batch import BLOCK_TOKENS


def store_kv_(cache: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """See `lorasrv_kernels.attention.store_kv_`."""
    block, offset = slot_mapping // BLOCK_TOKENS, slot_mapping % BLOCK_TOKENS
    cache[block, 0, :, offset] = k
    cache[block, 1, :, offset] = v


def paged_attention(
    q: Tensor, cache: Tensor, block_tables: Tensor, tiles: Tensor, tile_tokens: int, scale: float
) -> Tensor:
    """See `lorasrv_kernels.attention.paged_attention`."""
    num_heads, head_size = q.shape[1:]
    num_kv_heads = cache.shape[2]
    group = num_heads // num_kv_heads
    tiles = tiles[(tiles[:, 2] + tiles[:, 3]).argsort(descending=True, stable=True)].long()
    sequence, first_row, num_rows, first_position = tiles.unbind(1)
    step = torch.arange(tile_tokens, device=q.device)
    in_tile = step < num_rows[:, None]  # [K, tile_tokens]
    rows = torch.where(in_tile, first_row[:, None] + step, first_row[:, None])
    positions = torch.where(in_tile, first_position[:, None] + step, first_position[:, None])
    # [K, tile_tokens, Hkv, group, D] -> [K * Hkv, tile_tokens * group, D]
    folded = q[rows].float().mul_(scale).unflatten(2, (num_kv_heads, group)).transpose(1, 2)
    folded = folded.reshape(len(tiles) * num_kv_heads, tile_tokens * group, head_size)
    limits = positions.repeat_interleave(group, dim=1).repeat_interleave(num_kv_heads, dim=0)[:, :, None]
    out = _walk_blocks(folded, cache, block_tables[sequence], limits, first_position + num_rows)
    out = out.view(len(tiles), num_kv_heads, tile_tokens, group, head_size).transpose(1, 2)
    result = torch.empty_like(q)
    result[rows[in_tile]] = out.reshape(len(tiles), tile_tokens, num_heads, head_size)[in_tile].to(q.dtype)
    return result


def _walk_blocks(folded: Tensor, cache: Tensor, blocks: Tensor, limits: Tensor, ends: Tensor) -> Tensor:
    """Online softmax of `folded` [K * Hkv, M, D] over the blocks [K, P] of each tile; `ends` [K] fall, tile by tile."""
    num_kv_heads = cache.shape[2]
    top = folded.new_full((*folded.shape[:2], 1), -torch.inf)
    total = torch.zeros_like(top)
    acc = torch.zeros_like(folded)
    step = torch.arange(BLOCK_TOKENS, device=folded.device)
    ends_list = ends.tolist()
    for start in range(0, ends_list[0] if ends_list else 0, BLOCK_TOKENS):
        active = sum(1 for end in ends_list if end > start)
        n = active * num_kv_heads
        k, v = cache[blocks[:active, start // BLOCK_TOKENS]].float().transpose(0, 1).flatten(1, 2)  # [n, 32, D]
        key_positions = start + step
        # positions past a tile's end were never written, and 0 * NaN is NaN
        unwritten = (key_positions >= ends[:active, None]).repeat_interleave(num_kv_heads, dim=0)
        v = v.masked_fill(unwritten[:, :, None], 0.0)
        scores = torch.bmm(folded[:n], k.transpose(1, 2)).masked_fill_(key_positions > limits[:n], -torch.inf)
        new_top = torch.maximum(top[:n], scores.amax(-1, keepdim=True))
        weights = (scores - new_top).exp_()
        decay = (top[:n] - new_top).exp_()
        total[:n] = total[:n] * decay + weights.sum(-1, keepdim=True)
        acc[:n] = acc[:n] * decay + torch.bmm(weights, v)
        top[:n] = new_top
    return acc / total
