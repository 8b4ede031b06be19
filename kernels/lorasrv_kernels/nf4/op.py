"""Contract of the NF4 kernels: schemas, checks, default implementations, gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorasrv_kernels.dense.op import check_out
from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.nf4 import gradient, native, reference
from lorasrv_kernels.nf4.codes import BLOCK_SIZE
from lorasrv_kernels.nf4.container import check_storage

_STORAGE = "Tensor packed, Tensor absmax, Tensor nested_absmax, Tensor offset, int[] out_features"
_library = torch.library.Library("lorasrv", "FRAGMENT")
_library.define(f"nf4_dequantize_({_STORAGE}, int in_features, int start_row, Tensor(a!) out) -> ()")
_library.define(f"nf4_linear_(Tensor x, {_STORAGE}, Tensor(a!) out, bool exact=True) -> ()")
_library.define(f"nf4_linear(Tensor x, {_STORAGE}, bool exact=True) -> Tensor")
_library.define(f"nf4_linear_grad(Tensor grad, {_STORAGE}, int in_features) -> Tensor")

# through the dispatcher, so that what is built on these gains from every device's own version
_dequantize_op = torch.ops.lorasrv.nf4_dequantize_.default
_linear_op = torch.ops.lorasrv.nf4_linear_.default

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What weights are dequantized to."""


def check_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    out_features: Sequence[int],
    in_features: int,
    start_row: int,
    out: Tensor,
) -> None:
    """Raises KernelError naming every argument that breaks the contract of `nf4_dequantize_`."""
    check_storage(packed, absmax, nested_absmax, offset, out_features, in_features)
    num_rows = sum(out_features)
    if (
        out.ndim != 2
        or out.shape[1] != in_features
        or out.dtype not in DTYPES
        or not out.is_contiguous()
        or not 0 <= start_row <= num_rows - out.shape[0]
    ):
        raise KernelError(
            f"nf4_dequantize_: out must be contiguous [rows, {in_features}] of {DTYPES} within {num_rows} rows, "
            f"got {out.dtype} {list(out.shape)} from row {start_row} on"
        )


def check_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    out_features: Sequence[int],
    out: Tensor | None = None,
    exact: bool = True,
) -> None:
    """Raises KernelError naming every argument that breaks the contract of `nf4_linear`."""
    del exact
    if x.ndim != 2 or x.dtype not in DTYPES:
        raise KernelError(f"nf4_linear: x must be [T, I] of {DTYPES}, got {x.dtype} {list(x.shape)}")
    check_storage(packed, absmax, nested_absmax, offset, out_features, x.shape[1])
    wrong = [] if out is None else check_out(x, sum(out_features), out)
    if wrong:
        raise KernelError("nf4_linear_: " + "; ".join(wrong))


def check_linear_grad(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    out_features: Sequence[int],
    in_features: int,
) -> None:
    """Raises KernelError naming every argument that breaks the contract of `nf4_linear_grad`."""
    num_rows = sum(out_features)
    if grad.ndim != 2 or grad.shape[1] != num_rows or grad.dtype not in DTYPES:
        raise KernelError(
            f"nf4_linear_grad: grad must be [T, {num_rows}] of {DTYPES}, got {grad.dtype} {list(grad.shape)}"
        )
    check_storage(packed, absmax, nested_absmax, offset, out_features, in_features)


def _nf4_dequantize_(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    out_features: Sequence[int],
    in_features: int,
    start_row: int,
    out: Tensor,
) -> None:
    check_dequantize(packed, absmax, nested_absmax, offset, out_features, in_features, start_row, out)
    reference.dequantize_(packed, absmax, nested_absmax, offset, out_features, in_features, start_row, out)


def _nf4_dequantize_cpu_(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    out_features: Sequence[int],
    in_features: int,
    start_row: int,
    out: Tensor,
) -> None:
    check_dequantize(packed, absmax, nested_absmax, offset, out_features, in_features, start_row, out)
    if not native.dequantize_(packed, absmax, nested_absmax, offset, out_features, in_features, start_row, out):
        reference.dequantize_(packed, absmax, nested_absmax, offset, out_features, in_features, start_row, out)


def _nf4_linear_(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    out_features: Sequence[int],
    out: Tensor,
    exact: bool = True,
) -> None:
    check_linear(x, packed, absmax, nested_absmax, offset, out_features, out, exact)
    reference.linear_by_panels_(
        x.contiguous(), packed, absmax, nested_absmax, offset, out_features, out, dequantize=_dequantize_op
    )


def _nf4_linear_cpu_(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    out_features: Sequence[int],
    out: Tensor,
    exact: bool = True,
) -> None:
    check_linear(x, packed, absmax, nested_absmax, offset, out_features, out, exact)
    rows = x.contiguous()
    if not exact and native.library_is_faster(rows):
        reference.linear_by_library_(
            rows, packed, absmax, nested_absmax, offset, out_features, out, dequantize=_dequantize_op
        )
    elif not native.linear_(rows, packed, absmax, nested_absmax, offset, out_features, out):
        reference.linear_by_panels_(
            rows, packed, absmax, nested_absmax, offset, out_features, out, dequantize=_dequantize_op
        )


def _nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    out_features: Sequence[int],
    exact: bool = True,
) -> Tensor:
    out = _linear_shape(x, packed, absmax, nested_absmax, offset, out_features, exact)
    _linear_op(x, packed, absmax, nested_absmax, offset, out_features, out, exact)
    return out


def _nf4_linear_grad(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    out_features: Sequence[int],
    in_features: int,
) -> Tensor:
    check_linear_grad(grad, packed, absmax, nested_absmax, offset, out_features, in_features)
    return reference.linear_grad_by_panels(
        grad, packed, absmax, nested_absmax, offset, out_features, in_features, dequantize=_dequantize_op
    )


def _nf4_linear_grad_cpu(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    out_features: Sequence[int],
    in_features: int,
) -> Tensor:
    if in_features % BLOCK_SIZE or not native.dequantizes_columns(grad.dtype):
        return _nf4_linear_grad(grad, packed, absmax, nested_absmax, offset, out_features, in_features)
    check_linear_grad(grad, packed, absmax, nested_absmax, offset, out_features, in_features)
    storage = (packed, absmax, nested_absmax, offset, out_features, in_features)
    return gradient.linear_grad_by_columns(
        grad, *storage, dequantize_columns=native.dequantize_columns_, panel_bytes=gradient.PANEL_BYTES
    )


def _linear_shape(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    out_features: Sequence[int],
    exact: bool = True,
) -> Tensor:
    check_linear(x, packed, absmax, nested_absmax, offset, out_features, exact=exact)
    return x.new_empty(x.shape[0], sum(out_features))


def _grad_shape(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    out_features: Sequence[int],
    in_features: int,
) -> Tensor:
    check_linear_grad(grad, packed, absmax, nested_absmax, offset, out_features, in_features)
    return grad.new_empty(grad.shape[0], in_features)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, packed, absmax, nested_absmax, offset, out_features, _ = inputs
    ctx.save_for_backward(packed, absmax, nested_absmax, offset)
    ctx.out_features, ctx.in_features = out_features, x.shape[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None, None, None]:
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.lorasrv.nf4_linear_grad(grad, *ctx.saved_tensors, ctx.out_features, ctx.in_features)
    return grad_x, None, None, None, None, None, None


_library.impl("nf4_dequantize_", _nf4_dequantize_, "CompositeExplicitAutograd")
_library.impl("nf4_dequantize_", _nf4_dequantize_cpu_, "CPU")
_library.impl("nf4_dequantize_", check_dequantize, "Meta")
_library.impl("nf4_linear_", _nf4_linear_, "CompositeExplicitAutograd")
_library.impl("nf4_linear_", _nf4_linear_cpu_, "CPU")
_library.impl("nf4_linear_", check_linear, "Meta")
_library.impl("nf4_linear", _nf4_linear, "CompositeExplicitAutograd")
_library.impl("nf4_linear", _linear_shape, "Meta")
_library.impl("nf4_linear_grad", _nf4_linear_grad, "CompositeExplicitAutograd")
_library.impl("nf4_linear_grad", _nf4_linear_grad_cpu, "CPU")
_library.impl("nf4_linear_grad", _grad_shape, "Meta")
torch.library.register_autograd("lorasrv::nf4_linear", _backward, setup_context=_setup_context, lib=_library)
