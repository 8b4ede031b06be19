"""Registers the NF4 ops for CUDA: Triton for I % 64 == 0, the reference for the rest and where there is no Triton."""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from lorasrv_kernels import triton_modules
from lorasrv_kernels.nf4 import op, reference
from lorasrv_kernels.nf4.codes import BLOCK_SIZE


def dequantize_(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    out_features: Sequence[int],
    in_features: int,
    start_row: int,
    out: Tensor,
) -> None:
    """`nf4_dequantize_` on CUDA tensors."""
    op.check_dequantize(packed, absmax, nested_absmax, offset, out_features, in_features, start_row, out)
    dequantize = getattr(_kernels(in_features), "dequantize_", reference.dequantize_)
    with torch.cuda.device_of(out):
        dequantize(packed, absmax, nested_absmax, offset, out_features, in_features, start_row, out)


def linear_(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    out_features: Sequence[int],
    out: Tensor,
    exact: bool = True,
) -> None:
    """`nf4_linear_` on CUDA tensors."""
    op.check_linear(x, packed, absmax, nested_absmax, offset, out_features, out)
    kernels, storage = _kernels(x.shape[1]), (packed, absmax, nested_absmax, offset, out_features)
    with torch.cuda.device_of(out):
        if kernels is None:
            reference.linear_by_panels_(x.contiguous(), *storage, out)
        else:
            kernels.linear_(x.contiguous(), *storage, out, exact)


def linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    out_features: Sequence[int],
    exact: bool = True,
) -> Tensor:
    """`nf4_linear` on CUDA tensors."""
    out = x.new_empty(x.shape[0], sum(out_features))
    linear_(x, packed, absmax, nested_absmax, offset, out_features, out, exact)
    return out


def linear_grad(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    out_features: Sequence[int],
    in_features: int,
) -> Tensor:
    """`nf4_linear_grad` on CUDA tensors."""
    op.check_linear_grad(grad, packed, absmax, nested_absmax, offset, out_features, in_features)
    gradient: Callable[..., Tensor] = getattr(_kernels(in_features), "linear_grad", reference.linear_grad_by_panels)
    with torch.cuda.device_of(grad):
        return gradient(grad, packed, absmax, nested_absmax, offset, out_features, in_features)


def _kernels(in_features: int) -> ModuleType | None:
    return None if in_features % BLOCK_SIZE else triton_modules.load("lorasrv_kernels.nf4.triton_kernels")


_library = torch.library.Library("lorasrv", "FRAGMENT")
_library.impl("nf4_dequantize_", dequantize_, "CUDA")
_library.impl("nf4_linear_", linear_, "CUDA")
_library.impl("nf4_linear", linear, "CUDA")
_library.impl("nf4_linear_grad", linear_grad, "CUDA")
