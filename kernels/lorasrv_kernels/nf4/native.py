"""Calls the native NF4 kernels. Knows their C interface; argument checks are the op's."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorasrv_kernels.cpu import library
from lorasrv_kernels.cpu.isa import Isa, isa_in_use
from lorasrv_kernels.cpu.linear import DTYPES, scratch, serving_isa
from lorasrv_kernels.nf4 import gradient
from lorasrv_kernels.nf4.calls import Nf4Dequantize, Nf4DequantizeColumns, Nf4LinearGrad, Nf4LinearInto
from lorasrv_kernels.nf4.codes import BLOCK_SIZE, levels, nested_codes

_POINTER, _SIZE, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_DEQUANTIZE_ARGUMENTS = [_POINTER] * 7 + [_SIZE] * 4 + [_POINTER] + [_NUMBER] * 2
_COLUMNS_ARGUMENTS = [_POINTER] * 7 + [_SIZE] * 4 + [_POINTER] + [_NUMBER] * 2
_LINEAR_ARGUMENTS = [_POINTER] * 8 + [_SIZE] * 3 + [_POINTER] * 2 + [_NUMBER] * 3

MIN_LIBRARY_TOKENS = 512
"""In bfloat16; in float32 the library needs twice the time for any number."""


def dequantize_(call: Nf4Dequantize, *, isa: Isa | None = None) -> bool:
    """Writes the rows from `start_row` on into out [rows, I], with the reference's own bits.

    Args:
        call: the arguments of the op.
        isa: one that the machine must have; None for the one in use.

    Returns:
        False, and out untouched, where there is no native version: library not built, I not a multiple of 64, or
        neither float32 nor bfloat16.
    """
    packed, absmax, nested_absmax, offset, out_features, in_features, start_row, out = call
    dtype, version = DTYPES.get(out.dtype), isa_in_use() if isa is None else isa
    function = _function("lorasrv_nf4_dequantize", tuple(_DEQUANTIZE_ARGUMENTS))
    if function is None or version is None or dtype is None or in_features % BLOCK_SIZE:
        return False
    function(
        packed.data_ptr(),
        absmax.data_ptr(),
        nested_absmax.data_ptr(),
        offset.data_ptr(),
        *_tables(),
        _rows(tuple(out_features)),
        len(out_features),
        in_features,
        start_row,
        out.shape[0],
        out.data_ptr(),
        dtype,
        version,
    )
    return True


def library_is_faster(x: Tensor) -> bool:
    """Whether so many rows of x [T, I] are multiplied faster by the library, with weights that `dequantize_` wrote."""
    return (
        x.dtype == torch.bfloat16
        and len(x) >= MIN_LIBRARY_TOKENS
        and x.shape[1] % BLOCK_SIZE == 0
        and _function("lorasrv_nf4_dequantize", tuple(_DEQUANTIZE_ARGUMENTS)) is not None
    )


def dequantizes_columns(dtype: torch.dtype) -> bool:
    """Whether `dequantize_columns_` has a version for weights of this dtype and I % 64 == 0."""
    return dtype in DTYPES and _function("lorasrv_nf4_dequantize_columns", tuple(_COLUMNS_ARGUMENTS)) is not None


def dequantize_columns_(call: Nf4DequantizeColumns, *, isa: Isa | None = None) -> None:
    """Writes the columns from `start_column` on into out [O, columns], with the reference's own bits.

    Only for what `dequantizes_columns` is true of, and I a multiple of 64. `isa` is one that the machine must have.
    """
    packed, absmax, nested_absmax, offset, out_features, in_features, start_column, out = call
    version = isa_in_use() if isa is None else isa
    function = _function("lorasrv_nf4_dequantize_columns", tuple(_COLUMNS_ARGUMENTS))
    assert function is not None, "the caller has asked"
    function(
        packed.data_ptr(),
        absmax.data_ptr(),
        nested_absmax.data_ptr(),
        offset.data_ptr(),
        *_tables(),
        _rows(tuple(out_features)),
        len(out_features),
        in_features,
        start_column,
        out.shape[1],
        out.data_ptr(),
        DTYPES[out.dtype],
        version,
    )


def linear_grad(call: Nf4LinearGrad) -> Tensor | None:
    """grad W [T, I] of grad [T, O]; None where there is no native version, as in `dequantize_`."""
    if call.in_features % BLOCK_SIZE or not dequantizes_columns(call.grad.dtype):
        return None
    return gradient.linear_grad_by_columns(
        call, dequantize_columns=dequantize_columns_, panel_bytes=gradient.PANEL_BYTES
    )


def linear_(call: Nf4LinearInto, *, isa: Isa | None = None) -> bool:
    """Writes x W^T into out [T, O].

    Args:
        call: the arguments of the op.
        isa: one that the machine must have; None for the one in use.

    Returns:
        False, and out untouched, where there is no native version: as in `dequantize_`, or only portable code.
    """
    x, packed, absmax, nested_absmax, offset, out_features, out, _ = call
    x = x.contiguous()
    num_tokens, in_features = x.shape
    dtype, version = DTYPES.get(x.dtype), serving_isa() if isa is None else isa
    function = _function("lorasrv_nf4_linear", tuple(_LINEAR_ARGUMENTS))
    if function is None or version is None or dtype is None or in_features % BLOCK_SIZE or not in_features:
        return False
    threads = torch.get_num_threads()
    function(
        x.data_ptr(),
        packed.data_ptr(),
        absmax.data_ptr(),
        nested_absmax.data_ptr(),
        offset.data_ptr(),
        *_tables(),
        _rows(tuple(out_features)),
        len(out_features),
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
def _function(name: str, arguments: tuple[Any, ...]) -> Callable[..., None] | None:
    return library.function(name, arguments)


@functools.cache
def _tables() -> tuple[int, int]:
    # the tensors live as long as the process
    cpu = torch.device("cpu")
    return levels(cpu).data_ptr(), nested_codes(cpu).data_ptr()


@functools.lru_cache(maxsize=1024)
def _rows(out_features: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(out_features))(*out_features)
