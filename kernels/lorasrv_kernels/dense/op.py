"""Contract of the dense linear layer: arguments, checks, gradient, and who serves."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorasrv_kernels import operators
from lorasrv_kernels.dense import native, reference
from lorasrv_kernels.errors import KernelError

CUDA_TILE_ROWS = 64
"""Token rows of one exact product on CUDA, where a product of 16 rows takes as long."""


class DenseLinear(NamedTuple):
    """Arguments of `dense_linear`."""

    x: Tensor  # [T, I]
    weight: Tensor  # [O, I]
    exact: bool = True


class DenseLinearInto(NamedTuple):
    """Arguments of `dense_linear_`."""

    x: Tensor  # [T, I]
    weight: Tensor  # [O, I]
    out: Tensor  # [T, O]
    exact: bool = True


def check(call: DenseLinear | DenseLinearInto) -> None:
    """Raises KernelError naming every argument that breaks the contract of `dense_linear`."""
    x, weight = call.x, call.weight
    wrong = []
    if weight.ndim != 2 or not weight.is_contiguous():
        wrong.append(f"weight must be contiguous [O, I], got {list(weight.shape)}")
    elif x.ndim != 2 or x.shape[1] != weight.shape[1]:
        wrong.append(f"x must be [T, {weight.shape[1]}], got {list(x.shape)}")
    if x.dtype != weight.dtype or not x.is_floating_point():
        wrong.append(f"x and weight must have one floating dtype, got {x.dtype} and {weight.dtype}")
    if isinstance(call, DenseLinearInto) and not wrong:
        wrong += check_out(x, weight.shape[0], call.out)
    if wrong:
        raise KernelError("dense_linear: " + "; ".join(wrong))


def check_out(x: Tensor, out_features: int, out: Tensor) -> list[str]:
    """What is wrong with the output of a linear layer of `out_features` rows applied to x [T, I]."""
    expected = [x.shape[0], out_features]
    if list(out.shape) == expected and out.dtype == x.dtype and out.is_contiguous():
        return []
    return [f"out must be contiguous {x.dtype} {expected}, got {out.dtype} {list(out.shape)}"]


def _linear_(call: DenseLinearInto) -> None:
    reference.linear_(call.x.contiguous(), call.weight, call.out)


def _linear_cuda_(call: DenseLinearInto) -> None:
    if call.exact:
        reference.linear_(call.x.contiguous(), call.weight, call.out, tile_rows=CUDA_TILE_ROWS)
    else:
        torch.mm(call.x, call.weight.t(), out=call.out)


def _linear_cpu_(call: DenseLinearInto) -> bool:
    return native.linear_(call.x.contiguous(), call.weight, call.out)


def _linear(call: DenseLinear) -> Tensor:
    out = _shape(call)
    # through the dispatcher, so that the functional twin gains from every device's own version
    linear_(call.x, call.weight, out, call.exact)
    return out


def _shape(call: DenseLinear) -> Tensor:
    return call.x.new_empty(call.x.shape[0], call.weight.shape[0])


linear_ = operators.define(
    "dense_linear_",
    DenseLinearInto,
    reference=_linear_,
    check=check,
    mutates="out",
    cpu=_linear_cpu_,
    cuda=_linear_cuda_,
)
linear = operators.define("dense_linear", DenseLinear, reference=_linear, check=check, shape=_shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    del output
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
    (weight,) = ctx.saved_tensors
    return (grad @ weight if ctx.needs_input_grad[0] else None), None, None


torch.library.register_autograd("lorasrv::dense_linear", _backward, setup_context=_setup_context, lib=operators.library)
