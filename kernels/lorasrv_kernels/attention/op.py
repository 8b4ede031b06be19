"""Contract of paged attention: schemas, checks, the default implementation and those for CUDA and CPU."""

from types import ModuleType

import torch
from torch import Tensor

from lorasrv_kernels import triton_modules
from lorasrv_kernels.attention import native, reference
from lorasrv_kernels.attention.batch import BLOCK_TOKENS, SPLIT_BLOCKS
from lorasrv_kernels.errors import KernelError

_library = torch.library.Library("lorasrv", "FRAGMENT")
_library.define("store_kv_(Tensor(a!) cache, Tensor k, Tensor v, Tensor slot_mapping) -> ()")
_library.define(
    "paged_attention(Tensor q, Tensor cache, Tensor block_tables, Tensor tiles, int tile_tokens, float scale, "
    f"int window, int split_blocks={SPLIT_BLOCKS}) -> Tensor"
)


def _check_cache(cache: Tensor, heads: int, head_size: int, dtype: torch.dtype) -> list[str]:
    if cache.ndim != 5 or cache.shape[1] != 2 or cache.shape[3] != BLOCK_TOKENS:
        return [f"cache must be [P, 2, Hkv, {BLOCK_TOKENS}, D], got {list(cache.shape)}"]
    wrong = []
    if cache.shape[4] != head_size or heads % cache.shape[2]:
        wrong.append(f"{heads} heads of size {head_size} do not fit a cache {list(cache.shape)}")
    if cache.dtype != dtype:
        wrong.append(f"cache must be {dtype}, got {cache.dtype}")
    return wrong


def check_store(cache: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """Raises KernelError naming every argument that breaks the contract of `store_kv_`."""
    wrong = []
    if k.shape != v.shape or k.ndim != 3 or k.dtype != v.dtype:
        wrong.append(f"k and v must be one shape [T, Hkv, D], got {list(k.shape)} and {list(v.shape)}")
    else:
        wrong = _check_cache(cache, k.shape[1], k.shape[2], k.dtype)
    if slot_mapping.shape != k.shape[:1] or slot_mapping.dtype != torch.int64:
        wrong.append(f"slot_mapping must be int64 [T], got {slot_mapping.dtype} {list(slot_mapping.shape)}")
    if wrong:
        raise KernelError("store_kv_: " + "; ".join(wrong))


def check_attention(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    tiles: Tensor,
    tile_tokens: int,
    scale: float,
    window: int,
    split_blocks: int = SPLIT_BLOCKS,
) -> Tensor:
    """Raises KernelError naming every argument that breaks the contract of `paged_attention`; the result is unset."""
    del scale
    _raise_if_wrong(q, cache, block_tables, tiles, tile_tokens, window, split_blocks)
    return torch.empty_like(q)


def _raise_if_wrong(
    q: Tensor, cache: Tensor, block_tables: Tensor, tiles: Tensor, tile_tokens: int, window: int, split_blocks: int
) -> None:
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


def _store(cache: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    check_store(cache, k, v, slot_mapping)
    reference.store_kv_(cache, k, v, slot_mapping)


def _attention(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    tiles: Tensor,
    tile_tokens: int,
    scale: float,
    window: int,
    split_blocks: int = SPLIT_BLOCKS,
) -> Tensor:
    check_attention(q, cache, block_tables, tiles, tile_tokens, scale, window, split_blocks)
    return reference.paged_attention(q, cache, block_tables, tiles, tile_tokens, scale, window)


def _attention_cuda(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    tiles: Tensor,
    tile_tokens: int,
    scale: float,
    window: int,
    split_blocks: int = SPLIT_BLOCKS,
) -> Tensor:
    check_attention(q, cache, block_tables, tiles, tile_tokens, scale, window, split_blocks)
    kernels = _kernels()
    if kernels is None:
        return reference.paged_attention(q, cache, block_tables, tiles, tile_tokens, scale, window)
    with torch.cuda.device_of(q):
        result: Tensor = kernels.paged_attention(
            q, cache, block_tables, tiles, tile_tokens, scale, window, split_blocks
        )
    return result


def _store_cuda(cache: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    check_store(cache, k, v, slot_mapping)
    kernels = _kernels() or reference
    with torch.cuda.device_of(cache):
        kernels.store_kv_(cache, k, v, slot_mapping)


def _kernels() -> ModuleType | None:
    return triton_modules.load("lorasrv_kernels.attention.triton_kernels")


def _store_cpu(cache: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    check_store(cache, k, v, slot_mapping)
    if not native.store_kv_(cache, k, v, slot_mapping):
        reference.store_kv_(cache, k, v, slot_mapping)


def _attention_cpu(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    tiles: Tensor,
    tile_tokens: int,
    scale: float,
    window: int,
    split_blocks: int = SPLIT_BLOCKS,
) -> Tensor:
    _raise_if_wrong(q, cache, block_tables, tiles, tile_tokens, window, split_blocks)
    out = native.paged_attention(q, cache, block_tables, tiles, scale, window)
    if out is None:
        return reference.paged_attention(q, cache, block_tables, tiles, tile_tokens, scale, window)
    return out


_library.impl("store_kv_", _store, "CompositeExplicitAutograd")
_library.impl("store_kv_", _store_cuda, "CUDA")
_library.impl("store_kv_", _store_cpu, "CPU")
_library.impl("store_kv_", check_store, "Meta")
_library.impl("paged_attention", _attention, "CompositeExplicitAutograd")
_library.impl("paged_attention", _attention_cuda, "CUDA")
_library.impl("paged_attention", _attention_cpu, "CPU")
_library.impl("paged_attention", check_attention, "Meta")
