"""The specification of causal attention over a paged cache, in float32.

Each query walks the KV blocks of its sequence from position 0 in steps of `BLOCK_TOKENS` with the online softmax
(Milakov and Gimelshein 2018, algorithm 3). A block after a query, or before its window, changes nothing in it, bit for
bit, so that decode, prefill and every way of chunking give the same row; a tile leaves out the blocks that lie before
the windows of all its rows. Tiles have a fixed number of rows for the same reason.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lorasrv_kernels.attention.batch import BLOCK_TOKENS, SPLIT_BLOCKS


class StoreKv(NamedTuple):
    """Arguments of `store_kv_`."""

    cache: Tensor  # [P, 2, Hkv, 32, D]
    k: Tensor  # [T, Hkv, D]
    v: Tensor  # [T, Hkv, D]
    slot_mapping: Tensor  # [T] int64


class PagedAttention(NamedTuple):
    """Arguments of `paged_attention`: the tables and tiles of an `AttentionBatch`."""

    q: Tensor  # [T, H, D]
    cache: Tensor  # [P, 2, Hkv, 32, D]
    block_tables: Tensor  # [N, P]
    tiles: Tensor  # [K, 4]
    tile_tokens: int
    scale: float
    window: int
    split_blocks: int = SPLIT_BLOCKS


def store_kv_(call: StoreKv) -> None:
    """See `lorasrv_kernels.attention.store_kv_`."""
    cache, k, v, slot_mapping = call
    stored = slot_mapping >= 0
    k, v, slot_mapping = k[stored], v[stored], slot_mapping[stored]
    block, offset = slot_mapping // BLOCK_TOKENS, slot_mapping % BLOCK_TOKENS
    cache[block, 0, :, offset] = k
    cache[block, 1, :, offset] = v


def paged_attention(call: PagedAttention) -> Tensor:
    """See `lorasrv_kernels.attention.paged_attention`."""
    q, cache, block_tables, tiles, tile_tokens, scale, window, _ = call
    num_heads, head_size = q.shape[1:]
    num_kv_heads = cache.shape[2]
    group = num_heads // num_kv_heads
    tiles = tiles[_seen_blocks(tiles, window)[1].argsort(descending=True, stable=True)].long()
    sequence, first_row, num_rows, first_position = tiles.unbind(1)
    step = torch.arange(tile_tokens, device=q.device)
    in_tile = step < num_rows[:, None]  # [K, tile_tokens]
    rows = torch.where(in_tile, first_row[:, None] + step, first_row[:, None])
    positions = torch.where(in_tile, first_position[:, None] + step, first_position[:, None])
    # [K, tile_tokens, Hkv, group, D] -> [K * Hkv, tile_tokens * group, D]
    folded = q[rows].float().mul_(scale).unflatten(2, (num_kv_heads, group)).transpose(1, 2)
    folded = folded.reshape(len(tiles) * num_kv_heads, tile_tokens * group, head_size)
    limits = positions.repeat_interleave(group, dim=1).repeat_interleave(num_kv_heads, dim=0)[:, :, None]
    out = _walk_blocks(folded, cache, block_tables[sequence], tiles, limits, window)
    out = out.view(len(tiles), num_kv_heads, tile_tokens, group, head_size).transpose(1, 2)
    result = torch.empty_like(q)
    result[rows[in_tile]] = out.reshape(len(tiles), tile_tokens, num_heads, head_size)[in_tile].to(q.dtype)
    return result


def _seen_blocks(tiles: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Per tile [K], the first block that any of its rows sees, and how many blocks they see together."""
    first_position, end = tiles[:, 3], tiles[:, 3] + tiles[:, 2]
    firsts = (first_position - window + 1).clamp_min(0) // BLOCK_TOKENS if window else torch.zeros_like(end)
    return firsts, (end + BLOCK_TOKENS - 1) // BLOCK_TOKENS - firsts


def _walk_blocks(folded: Tensor, cache: Tensor, blocks: Tensor, tiles: Tensor, limits: Tensor, window: int) -> Tensor:
    """Online softmax of `folded` [K * Hkv, M, D], rows at positions `limits`, over the blocks [K, P] of their tiles.

    The number of blocks falls from tile to tile, so that the tiles still walking come first.
    """
    firsts, counts = _seen_blocks(tiles, window)
    num_blocks = counts.tolist()
    ends = tiles[:, 3] + tiles[:, 2]
    num_kv_heads = cache.shape[2]
    top = folded.new_full((*folded.shape[:2], 1), -torch.inf)
    total = torch.zeros_like(top)
    acc = torch.zeros_like(folded)
    step = torch.arange(BLOCK_TOKENS, device=folded.device)
    for turn in range(num_blocks[0] if num_blocks else 0):
        active = sum(1 for count in num_blocks if count > turn)
        n = active * num_kv_heads
        places = firsts[:active, None] + turn  # [active, 1]
        k, v = cache[blocks[:active].gather(1, places)[:, 0]].float().transpose(0, 1).flatten(1, 2)  # [n, 32, D]
        positions = (places * BLOCK_TOKENS + step).repeat_interleave(num_kv_heads, dim=0)  # [n, 32]
        # positions past a tile's end were never written, and 0 * NaN is NaN
        unwritten = positions >= ends[:active].repeat_interleave(num_kv_heads)[:, None]
        v = v.masked_fill(unwritten[:, :, None], 0.0)
        unseen = _unseen(positions[:, None], limits[:n], window)
        scores = torch.bmm(folded[:n], k.transpose(1, 2)).masked_fill_(unseen, -torch.inf)
        new_top = torch.maximum(top[:n], scores.amax(-1, keepdim=True))
        # a row that has seen nothing yet stays as it began: exp(-inf) is 0, exp(-inf - -inf) would be NaN
        origin = new_top.masked_fill(new_top == -torch.inf, 0.0)
        weights = (scores - origin).exp_()
        decay = (top[:n] - origin).exp_()
        total[:n] = total[:n] * decay + weights.sum(-1, keepdim=True)
        acc[:n] = acc[:n] * decay + torch.bmm(weights, v)
        top[:n] = new_top
    return acc / total


def _unseen(positions: Tensor, limits: Tensor, window: int) -> Tensor:
    later = positions > limits
    return later | (positions <= limits - window) if window else later
