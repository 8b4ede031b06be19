"""Calls the native low-rank update. Knows its C interface; argument checks are the op's."""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lorasrv_kernels.cpu import library
from lorasrv_kernels.cpu.isa import Isa, isa_in_use
from lorasrv_kernels.lora.reference import LoraApply

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = (
    *(_POINTER, _INTEGER, _POINTER, _INTEGER, _INTEGER, _POINTER),  # y, x, arena
    *(_POINTER, _INTEGER, _INTEGER, _POINTER, _INTEGER),  # table, out_features
    *(_POINTER, _POINTER, _POINTER, _POINTER, _INTEGER),  # tiles
    *(_POINTER, _INTEGER, _POINTER),  # base_rows, bias
    *(ctypes.c_int32, ctypes.c_int32),
)


def lora_apply_(call: LoraApply, *, isa: Isa | None = None) -> bool:
    """The update in place, as `lorasrv_kernels.lora.lora_apply_` states it.

    Args:
        call: the arguments of the op.
        isa: one that the machine must have; None for the one in use.

    Returns:
        False, and y untouched, where there is no native version: library not built, neither float32 nor bfloat16,
        columns of y or of the table that are not contiguous, or a batch that is not laid out as `SlotBatch` does.
    """
    y, x, arena, table, out_features, rows, weights, tile_slots, tile_starts, base_rows, bias, *_ = call
    function, dtype = _function(), _DTYPES.get(y.dtype)
    if function is None or dtype is None or y.stride(1) != 1 or table.stride(2) != 1:
        return False
    if not _plain(rows, weights, tile_slots, tile_starts):
        return False
    arena, base_rows = arena.contiguous(), base_rows.contiguous()
    bias = None if bias is None else bias.contiguous()
    if x.stride(1) != 1:
        x = x.contiguous()
    slot_stride, slice_stride, _ = table.stride()
    function(
        y.data_ptr(),
        y.stride(0),
        x.data_ptr(),
        x.stride(0),
        x.shape[1],
        arena.data_ptr(),
        table.data_ptr(),
        slot_stride,
        slice_stride,
        _widths(tuple(out_features)),
        len(out_features),
        rows.data_ptr(),
        weights.data_ptr(),
        tile_slots.data_ptr(),
        tile_starts.data_ptr(),
        tile_slots.shape[0],
        base_rows.data_ptr(),
        base_rows.shape[0],
        None if bias is None else bias.data_ptr(),
        dtype,
        isa_in_use() if isa is None else isa,
    )
    return True


def _plain(rows: Tensor, weights: Tensor, tile_slots: Tensor, tile_starts: Tensor) -> bool:
    floats, numbers = weights.dtype == torch.float32, tile_slots.dtype == tile_starts.dtype == torch.int32
    return floats and numbers and all(part.is_contiguous() for part in (rows, weights, tile_slots, tile_starts))


@functools.cache
def _function() -> Callable[..., None] | None:
    return library.function("lorasrv_lora_apply", _ARGUMENTS)


@functools.lru_cache(maxsize=1024)
def _widths(out_features: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(out_features))(*out_features)
