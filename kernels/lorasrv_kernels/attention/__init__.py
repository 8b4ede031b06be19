"""Causal attention over a paged KV cache: decode and chunked prefill in one call."""

from torch import Tensor

from lorasrv_kernels.attention import op
from lorasrv_kernels.attention.batch import BLOCK_TOKENS, SPLIT_BLOCKS, AttentionBatch, Span, split_blocks, tile_tokens

__all__ = [
    "BLOCK_TOKENS",
    "SPLIT_BLOCKS",
    "AttentionBatch",
    "Span",
    "paged_attention",
    "split_blocks",
    "store_kv_",
    "tile_tokens",
]


def store_kv_(cache: Tensor, k: Tensor, v: Tensor, batch: AttentionBatch) -> None:
    """In place: writes the keys and values of this step's tokens into one layer's cache.

    Args:
        cache: [P, 2, Hkv, 32, D], any strides; keys at index 0 and values at 1; changed in place.
        k, v: [T, Hkv, D], same dtype as the cache.
        batch: where each token goes.

    Raises:
        KernelError: shapes or dtypes break this contract.
    """
    op.store_kv_(cache, k, v, batch.slot_mapping)


def paged_attention(q: Tensor, cache: Tensor, batch: AttentionBatch, *, scale: float, window: int = 0) -> Tensor:
    """softmax(scale * q K^T) V per token over its own and earlier positions of its sequence.

    Args:
        q: [T, H, D], same dtype as the cache; H a multiple of Hkv, heads that share a KV head side by side.
        cache: [P, 2, Hkv, 32, D], any strides, with this step's keys and values already stored.
        batch: the sequences; its tiles hold at most `batch.tile_tokens` tokens.
        scale: usually D ** -0.5.
        window: how many positions a token sees, its own included; 0: all of them.

    Returns:
        [T, H, D] in q's dtype; every row independent of the other sequences and of chunking, bit for bit.

    Raises:
        KernelError: shapes or dtypes break this contract.
    """
    return op.paged_attention(
        q, cache, batch.block_tables, batch.tiles, batch.tile_tokens, scale, window, batch.split_blocks
    )
