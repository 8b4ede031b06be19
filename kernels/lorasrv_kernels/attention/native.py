"""Calls the native attention. Knows its C interface; argument checks are the op's."""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lorasrv_kernels.attention.reference import PagedAttention, StoreKv
from lorasrv_kernels.cpu import library
from lorasrv_kernels.cpu.isa import Isa, isa_in_use

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64
_ATTENTION_ARGUMENTS = (
    *(_POINTER, _INTEGER, _INTEGER, _POINTER),  # q, out
    *(_POINTER, _INTEGER, _INTEGER, _INTEGER, _INTEGER),  # cache
    *(_POINTER, _INTEGER, _POINTER, _INTEGER),  # block_tables, tiles
    *(_INTEGER, _INTEGER, _INTEGER),  # heads
    *(ctypes.c_float, _INTEGER, ctypes.c_int32, ctypes.c_int32),
)
_STORE_ARGUMENTS = (
    *(_POINTER, _INTEGER, _INTEGER, _INTEGER, _INTEGER),  # cache
    *(_POINTER, _INTEGER, _INTEGER),  # k
    *(_POINTER, _INTEGER, _INTEGER),  # v
    *(_POINTER, _INTEGER, _INTEGER, _INTEGER),  # slot_mapping, sizes
)


def store_kv_(call: StoreKv) -> bool:
    """Writes keys and values, as `lorasrv_kernels.attention.store_kv_` states it.

    Returns:
        False, and the cache untouched, where there is no native version: library not built, or heads that are not
        contiguous.
    """
    cache, k, v, slot_mapping = call
    functions = _functions()
    if functions is None or not cache.stride(4) == k.stride(2) == v.stride(2) == 1:
        return False
    size = k.element_size()
    functions[1](
        cache.data_ptr(),
        *(size * stride for stride in cache.stride()[:4]),
        k.data_ptr(),
        *(size * stride for stride in k.stride()[:2]),
        v.data_ptr(),
        *(size * stride for stride in v.stride()[:2]),
        slot_mapping.contiguous().data_ptr(),
        *k.shape[:2],
        size * k.shape[2],
    )
    return True


def paged_attention(call: PagedAttention, *, isa: Isa | None = None) -> Tensor | None:
    """Attention, as `lorasrv_kernels.attention.paged_attention` states it.

    Args:
        call: the arguments of the op.
        isa: one that the machine must have; None for the one in use.

    Returns:
        [T, H, D]; None where there is no native version: library not built, neither float32 nor bfloat16, a cache
        whose heads are not contiguous, or tables that are not laid out as `AttentionBatch` does.
    """
    q, cache, block_tables, tiles, _, scale, window, _ = call
    functions, dtype = _functions(), _DTYPES.get(q.dtype)
    if functions is None or dtype is None or cache.stride(4) != 1:
        return None
    if not (block_tables.dtype == tiles.dtype == torch.int32 and block_tables.is_contiguous()):
        return None
    out = torch.empty(q.shape, dtype=q.dtype)
    q, tiles = q if q.stride(2) == 1 else q.contiguous(), tiles.contiguous()
    functions[0](
        q.data_ptr(),
        q.stride(0),
        q.stride(1),
        out.data_ptr(),
        cache.data_ptr(),
        *cache.stride()[:4],
        block_tables.data_ptr(),
        block_tables.stride(0),
        tiles.data_ptr(),
        tiles.shape[0],
        q.shape[1],
        *cache.shape[2:5:2],
        scale,
        window,
        dtype,
        isa_in_use() if isa is None else isa,
    )
    return out


@functools.cache
def _functions() -> tuple[Callable[..., None], Callable[..., None]] | None:
    attention = library.function("lorasrv_paged_attention", _ATTENTION_ARGUMENTS)
    store = library.function("lorasrv_store_kv", _STORE_ARGUMENTS)
    return None if attention is None or store is None else (attention, store)
