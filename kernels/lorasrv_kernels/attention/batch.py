"""Where the sequences of one step lie: built on the host once a step, shared by every layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasrv_kernels.errors import KernelError

BLOCK_TOKENS = 32
"""Positions of one KV block."""

SPLIT_BLOCKS = 8
"""KV blocks that are attended to one after the other, where others are walked at the same time."""

_MAX_SPLITS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The tokens of one sequence that a step computes."""

    start: int
    """Position of the first token computed now; everything before it is in the cache."""
    num_tokens: int
    block_table: Sequence[int]
    """KV blocks of the sequence, enough for `start + num_tokens` positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBatch:
    """N sequences laid one after the other into T token rows, cut into K query tiles."""

    slot_mapping: Tensor  # [T] int64
    """Cache position of each token: block * BLOCK_TOKENS + offset in the block; -1: it is not stored."""
    block_tables: Tensor  # [N, P] int32
    """KV blocks of each sequence, padded with 0."""
    tiles: Tensor  # [K, 4] int32
    """Per query tile: sequence, first token row, number of rows (0: it does nothing), position of the first."""
    tile_tokens: int
    """Most rows of a tile."""
    split_blocks: int = SPLIT_BLOCKS
    """KV blocks of one split on CUDA; part of the order of addition, so one number for all steps of a server."""

    @classmethod
    def from_spans(
        cls,
        spans: Sequence[Span],
        *,
        tile_tokens: int,
        split_blocks: int = SPLIT_BLOCKS,
        device: torch.device | str = "cpu",
    ) -> "AttentionBatch":
        """Lays the spans out in order.

        Raises:
            KernelError: a block table is too short for its positions.
        """
        slot_mapping: list[int] = []
        tiles: list[tuple[int, int, int, int]] = []
        width = max((len(span.block_table) for span in spans), default=0)
        for sequence, span in enumerate(spans):
            end = span.start + span.num_tokens
            if len(span.block_table) * BLOCK_TOKENS < end:
                raise KernelError(f"span {sequence} ends at {end} but has {len(span.block_table)} blocks")
            for first in range(0, span.num_tokens, tile_tokens):
                num_rows = min(tile_tokens, span.num_tokens - first)
                tiles.append((sequence, len(slot_mapping) + first, num_rows, span.start + first))
            slot_mapping.extend(
                span.block_table[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS
                for position in range(span.start, end)
            )
        padded = [[*span.block_table, *[0] * (width - len(span.block_table))] for span in spans]
        return cls(
            slot_mapping=torch.tensor(slot_mapping, dtype=torch.int64, device=device),
            block_tables=torch.tensor(padded, dtype=torch.int32, device=device).view(len(spans), width),
            tiles=torch.tensor(tiles, dtype=torch.int32, device=device).view(len(tiles), 4),
            tile_tokens=tile_tokens,
            split_blocks=split_blocks,
        )


def split_blocks(num_positions: int) -> int:
    """KV blocks of one split where sequences have up to `num_positions` positions: so many that splits are few."""
    num_blocks = -(-num_positions // BLOCK_TOKENS)
    return max(SPLIT_BLOCKS, -(-num_blocks // _MAX_SPLITS))


def tile_tokens(num_heads: int, num_kv_heads: int) -> int:
    """Tokens of a query tile: as many as give 16 rows once the heads that share a KV head are folded in."""
    return max(1, 16 * num_kv_heads // num_heads)
