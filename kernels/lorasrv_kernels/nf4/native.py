"""Calls the native NF4 kernel. Knows its C interface; argument checks are the op's."""

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorasrv_kernels.cpu import library
from lorasrv_kernels.nf4.codes import BLOCK_SIZE, levels, nested_codes

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_ARGUMENTS = [ctypes.c_void_p] * 7 + [ctypes.c_int64] * 4 + [ctypes.c_void_p] + [ctypes.c_int32] * 2


def dequantize_(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    out_features: Sequence[int],
    in_features: int,
    start_row: int,
    out: Tensor,
    *,
    isa: int | None = None,
) -> bool:
    """Writes the rows from `start_row` on into out [rows, I], with the reference's own bits.

    Args:
        packed, absmax, nested_absmax, offset, out_features, in_features, start_row, out: as the op takes them.
        isa: 0 for portable code, 1 for AVX-512, which the machine must have; None for the widest it has.

    Returns:
        False, and out untouched, where there is no native version: library not built, I not a multiple of 64, or
        neither float32 nor bfloat16.
    """
    dtype = _DTYPES.get(out.dtype)
    kernel = _kernel()
    if kernel is None or dtype is None or in_features % BLOCK_SIZE:
        return False
    function, widest, tables = kernel
    function(
        packed.data_ptr(),
        absmax.data_ptr(),
        nested_absmax.data_ptr(),
        offset.data_ptr(),
        tables[0].data_ptr(),
        tables[1].data_ptr(),
        _rows(tuple(out_features)),
        len(out_features),
        in_features,
        start_row,
        out.shape[0],
        out.data_ptr(),
        dtype,
        widest if isa is None else isa,
    )
    return True


def widest_isa() -> int | None:
    """The widest instruction set the kernel can use here, numbered as in `dequantize_`; None where it is not built."""
    kernel = _kernel()
    return None if kernel is None else kernel[1]


@functools.cache
def _kernel() -> tuple[Callable[..., None], int, tuple[Tensor, Tensor]] | None:
    native = library.load()
    if native is None:
        return None
    function = native.lorasrv_nf4_dequantize
    function.argtypes = _ARGUMENTS
    function.restype = None
    cpu = torch.device("cpu")
    return function, int(native.lorasrv_nf4_isa()), (levels(cpu), nested_codes(cpu))


@functools.lru_cache(maxsize=1024)
def _rows(out_features: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(out_features))(*out_features)
