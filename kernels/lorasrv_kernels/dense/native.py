"""Calls the native dense linear layer. Knows its C interface; argument checks are the op's."""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lorasrv_kernels.cpu import library
from lorasrv_kernels.cpu.isa import Isa
from lorasrv_kernels.cpu.linear import DTYPES, GRANULE, scratch, serving_isa

_ARGUMENTS = (
    [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 2 + [ctypes.c_int32] * 3
)  # x, weight; O, T, I; out, scratch; dtype, instruction set, threads


def linear_(x: Tensor, weight: Tensor, out: Tensor, *, isa: Isa | None = None) -> bool:
    """Writes x W^T into out [T, O]; x [T, I] and weight [O, I] contiguous.

    Args:
        x, weight, out: as the op takes them.
        isa: one that the machine must have; None for the one in use.

    Returns:
        False, and out untouched, where there is no native version: library not built, I not a multiple of 64,
        neither float32 nor bfloat16, or only portable code.
    """
    num_tokens, in_features = x.shape
    dtype, version = DTYPES.get(x.dtype), serving_isa() if isa is None else isa
    function = _function()
    if function is None or version is None or dtype is None or in_features % GRANULE or not in_features:
        return False
    threads = torch.get_num_threads()
    function(
        x.data_ptr(),
        weight.data_ptr(),
        weight.shape[0],
        num_tokens,
        in_features,
        out.data_ptr(),
        scratch(num_tokens, in_features, dtype, version, threads).data_ptr(),
        dtype,
        version,
        threads,
    )
    return True


@functools.cache
def _function() -> Callable[..., None] | None:
    return library.function("lorasrv_dense_linear", _ARGUMENTS)
