"""Weights in NF4 with double quantization, and linear layers over them."""

import torch
from torch import Tensor

from lorasrv_kernels.nf4 import op
from lorasrv_kernels.nf4.container import NF4Weight
from lorasrv_kernels.nf4.quantize import quantize

__all__ = ["NF4Weight", "dequantize", "nf4_linear", "quantize"]


def nf4_linear(x: Tensor, weight: NF4Weight, *, out: Tensor | None = None, exact: bool = True) -> Tensor:
    """x W^T; if `exact`, a row's result does not depend on the number of rows or on the other rows.

    Differentiable with respect to x alone, and only without `out`.

    Args:
        x: [T, I], float32, bfloat16 or float16; W is dequantized to this dtype.
        weight: [O, I] on the device of x.
        out: [T, O], contiguous, the dtype of x; written and returned if given. Serving passes it, under inference mode.
        exact: whether every number of rows is multiplied in one way. For many rows another may be faster.

    Raises:
        KernelError: shapes or dtypes break this contract.
    """
    storage = (weight.packed, weight.absmax, weight.nested_absmax, weight.offset, weight.out_features)
    if out is None:
        return op.linear(x, *storage, exact)
    op.linear_(x, *storage, out, exact)
    return out


def dequantize(
    weight: NF4Weight,
    *,
    start_row: int = 0,
    stop_row: int | None = None,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Rows [start_row, stop_row) of the weight: [rows, I].

    Args:
        weight: [O, I].
        start_row: the first row.
        stop_row: one past the last row; None for O.
        dtype: float32, bfloat16 or float16; ignored if `out` is given.
        out: [rows, I], contiguous; written and returned if given.

    Raises:
        KernelError: rows out of range, or `out` does not fit.
    """
    num_rows, in_features = weight.shape
    stop = num_rows if stop_row is None else stop_row
    if out is None:
        out = torch.empty(max(0, stop - start_row), in_features, dtype=dtype, device=weight.device)
    op.dequantize_(
        weight.packed,
        weight.absmax,
        weight.nested_absmax,
        weight.offset,
        weight.out_features,
        in_features,
        start_row,
        out,
    )
    return out
