"""Contract of the NF4 kernels: checks, gradient, and who serves."""

from typing import Any

import torch
from torch import Tensor

from lorasrv_kernels import operators
from lorasrv_kernels.dense.op import check_out
from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.nf4 import native, reference
from lorasrv_kernels.nf4.calls import Nf4Dequantize, Nf4Linear, Nf4LinearGrad, Nf4LinearInto
from lorasrv_kernels.nf4.codes import BLOCK_SIZE
from lorasrv_kernels.nf4.container import check_storage

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What weights are dequantized to."""

_TRITON = f"{__package__}.triton_kernels"


def check_dequantize(call: Nf4Dequantize) -> None:
    """Raises KernelError naming every argument that breaks the contract of `nf4_dequantize_`."""
    check_storage(*call[:6])
    out, num_rows = call.out, sum(call.out_features)
    if (
        out.ndim != 2
        or out.shape[1] != call.in_features
        or out.dtype not in DTYPES
        or not out.is_contiguous()
        or not 0 <= call.start_row <= num_rows - out.shape[0]
    ):
        raise KernelError(
            f"nf4_dequantize_: out must be contiguous [rows, {call.in_features}] of {DTYPES} within {num_rows} rows, "
            f"got {out.dtype} {list(out.shape)} from row {call.start_row} on"
        )


def check_linear(call: Nf4Linear | Nf4LinearInto) -> None:
    """Raises KernelError naming every argument that breaks the contract of `nf4_linear`."""
    x = call.x
    if x.ndim != 2 or x.dtype not in DTYPES:
        raise KernelError(f"nf4_linear: x must be [T, I] of {DTYPES}, got {x.dtype} {list(x.shape)}")
    check_storage(*call[1:6], x.shape[1])


def check_linear_into(call: Nf4LinearInto) -> None:
    """Raises KernelError naming every argument that breaks the contract of `nf4_linear_`."""
    check_linear(call)
    wrong = check_out(call.x, sum(call.out_features), call.out)
    if wrong:
        raise KernelError("nf4_linear_: " + "; ".join(wrong))


def check_linear_grad(call: Nf4LinearGrad) -> None:
    """Raises KernelError naming every argument that breaks the contract of `nf4_linear_grad`."""
    grad, num_rows = call.grad, sum(call.out_features)
    if grad.ndim != 2 or grad.shape[1] != num_rows or grad.dtype not in DTYPES:
        raise KernelError(
            f"nf4_linear_grad: grad must be [T, {num_rows}] of {DTYPES}, got {grad.dtype} {list(grad.shape)}"
        )
    check_storage(*call[1:])


# through the dispatcher, so that what is built on these gains from every device's own version


def _dequantize_(call: Nf4Dequantize) -> None:
    dequantize_(*call)


def _linear_(call: Nf4LinearInto) -> None:
    reference.linear_by_panels_(call, dequantize=_dequantize_)


def _linear_cpu_(call: Nf4LinearInto) -> bool:
    if call.exact or not native.library_is_faster(call.x):
        return native.linear_(call)
    reference.linear_by_library_(call, dequantize=_dequantize_)
    return True


def _linear(call: Nf4Linear) -> Tensor:
    out = _linear_shape(call)
    linear_(*call[:6], out, call.exact)
    return out


def _linear_grad(call: Nf4LinearGrad) -> Tensor:
    return reference.linear_grad_by_panels(call, dequantize=_dequantize_)


def _linear_shape(call: Nf4Linear) -> Tensor:
    return call.x.new_empty(call.x.shape[0], sum(call.out_features))


def _grad_shape(call: Nf4LinearGrad) -> Tensor:
    return call.grad.new_empty(call.grad.shape[0], call.in_features)


def _whole_blocks(call: Nf4Dequantize | Nf4LinearGrad) -> bool:
    return call.in_features % BLOCK_SIZE == 0


def _whole_blocks_of_x(call: Nf4LinearInto) -> bool:
    return call.x.shape[1] % BLOCK_SIZE == 0


dequantize_ = operators.define(
    "nf4_dequantize_",
    Nf4Dequantize,
    reference=reference.dequantize_,
    check=check_dequantize,
    mutates="out",
    cpu=native.dequantize_,
    cuda=operators.in_triton(_TRITON, "dequantize_", reference.dequantize_, serves=_whole_blocks),
)
linear_ = operators.define(
    "nf4_linear_",
    Nf4LinearInto,
    reference=_linear_,
    check=check_linear_into,
    mutates="out",
    cpu=_linear_cpu_,
    cuda=operators.in_triton(_TRITON, "linear_", _linear_, serves=_whole_blocks_of_x),
)
linear = operators.define("nf4_linear", Nf4Linear, reference=_linear, check=check_linear, shape=_linear_shape)
linear_grad = operators.define(
    "nf4_linear_grad",
    Nf4LinearGrad,
    reference=_linear_grad,
    check=check_linear_grad,
    shape=_grad_shape,
    cpu=native.linear_grad,
    cuda=operators.in_triton(_TRITON, "linear_grad", _linear_grad, serves=_whole_blocks),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, packed, absmax, nested_absmax, offset, out_features, _ = inputs
    ctx.save_for_backward(packed, absmax, nested_absmax, offset)
    ctx.out_features, ctx.in_features = out_features, x.shape[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None, None, None]:
    grad_x = None
    if ctx.needs_input_grad[0]:
        packed, absmax, nested_absmax, offset = ctx.saved_tensors
        grad_x = linear_grad(grad, packed, absmax, nested_absmax, offset, ctx.out_features, ctx.in_features)
    return grad_x, None, None, None, None, None, None


torch.library.register_autograd("lorasrv::nf4_linear", _backward, setup_context=_setup_context, lib=operators.library)
