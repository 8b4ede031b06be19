"""Contract of paged attention: checks, and who serves."""

import torch
from torch import Tensor

from lorasrv_kernels import operators
from lorasrv_kernels.attention import native, reference
from lorasrv_kernels.attention.batch import BLOCK_TOKENS
from lorasrv_kernels.attention.reference import PagedAttention, StoreKv
from lorasrv_kernels.errors import KernelError


def _check_cache(cache: Tensor, heads: int, head_size: int, dtype: torch.dtype) -> list[str]:
    if cache.ndim != 5 or cache.shape[1] != 2 or cache.shape[3] != BLOCK_TOKENS:
        return [f"cache must be [P, 2, Hkv, {BLOCK_TOKENS}, D], got {list(cache.shape)}"]
    wrong = []
    if cache.shape[4] != head_size or heads % cache.shape[2]:
        wrong.append(f"{heads} heads of size {head_size} do not fit a cache {list(cache.shape)}")
    if cache.dtype != dtype:
        wrong.append(f"cache must be {dtype}, got {cache.dtype}")
    return wrong


def check_store(call: StoreKv) -> None:
    """Raises KernelError naming every argument that breaks the contract of `store_kv_`."""
    cache, k, v, slot_mapping = call
    wrong = []
    if k.shape != v.shape or k.ndim != 3 or k.dtype != v.dtype:
        wrong.append(f"k and v must be one shape [T, Hkv, D], got {list(k.shape)} and {list(v.shape)}")
    else:
        wrong = _check_cache(cache, k.shape[1], k.shape[2], k.dtype)
    if slot_mapping.shape != k.shape[:1] or slot_mapping.dtype != torch.int64:
        wrong.append(f"slot_mapping must be int64 [T], got {slot_mapping.dtype} {list(slot_mapping.shape)}")
    if wrong:
        raise KernelError("store_kv_: " + "; ".join(wrong))


def check_attention(call: PagedAttention) -> None:
    """Raises KernelError naming every argument that breaks the contract of `paged_attention`."""
    q, cache, block_tables, tiles, tile_tokens, _, window, split_blocks = call
    if q.ndim != 3:
        raise KernelError(f"paged_attention: q must be [T, H, D], got {list(q.shape)}")
    wrong = _check_cache(cache, q.shape[1], q.shape[2], q.dtype)
    if tiles.ndim != 2 or tiles.shape[1] != 4 or tile_tokens < 1:
        wrong.append(f"tiles must be [K, 4] with tile_tokens >= 1, got {list(tiles.shape)} and {tile_tokens}")
    if block_tables.ndim != 2:
        wrong.append(f"block_tables must be [N, P], got {list(block_tables.shape)}")
    if window < 0:
        wrong.append(f"window must be at least 0, got {window}")
    if split_blocks < 1:
        wrong.append(f"split_blocks must be at least 1, got {split_blocks}")
    if wrong:
        raise KernelError("paged_attention: " + "; ".join(wrong))


_TRITON = f"{__package__}.triton_kernels"
store_kv_ = operators.define(
    "store_kv_",
    StoreKv,
    reference=reference.store_kv_,
    check=check_store,
    mutates="cache",
    cpu=native.store_kv_,
    cuda=operators.in_triton(_TRITON, "store_kv_", reference.store_kv_),
)
paged_attention = operators.define(
    "paged_attention",
    PagedAttention,
    reference=reference.paged_attention,
    check=check_attention,
    shape=lambda call: torch.empty_like(call.q),
    cpu=native.paged_attention,
    cuda=operators.in_triton(_TRITON, "paged_attention", reference.paged_attention),
)
