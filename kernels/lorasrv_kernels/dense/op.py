"""Contract of the dense linear layer: schemas, checks, default implementation, gradient."""

from typing import Any

import torch
from torch import Tensor

from lorasrv_kernels.dense import native, reference
from lorasrv_kernels.errors import KernelError

_library = torch.library.Library("lorasrv", "FRAGMENT")
_library.define("dense_linear_(Tensor x, Tensor weight, Tensor(a!) out, bool exact=True) -> ()")
_library.define("dense_linear(Tensor x, Tensor weight, bool exact=True) -> Tensor")

# through the dispatcher, so that the functional twin gains from every device's own version
_linear_op = torch.ops.lorasrv.dense_linear_.default


CUDA_TILE_ROWS = 64
"""Token rows of one exact product on CUDA, where a product of 16 rows takes as long."""


def check(x: Tensor, weight: Tensor, out: Tensor | None = None, exact: bool = True) -> None:
    """Raises KernelError naming every argument that breaks the contract of `dense_linear`."""
    del exact
    wrong = []
    if weight.ndim != 2 or not weight.is_contiguous():
        wrong.append(f"weight must be contiguous [O, I], got {list(weight.shape)}")
    elif x.ndim != 2 or x.shape[1] != weight.shape[1]:
        wrong.append(f"x must be [T, {weight.shape[1]}], got {list(x.shape)}")
    if x.dtype != weight.dtype or not x.is_floating_point():
        wrong.append(f"x and weight must have one floating dtype, got {x.dtype} and {weight.dtype}")
    if out is not None and not wrong:
        wrong += check_out(x, weight.shape[0], out)
    if wrong:
        raise KernelError("dense_linear: " + "; ".join(wrong))


def check_out(x: Tensor, out_features: int, out: Tensor) -> list[str]:
    """What is wrong with the output of a linear layer of `out_features` rows applied to x [T, I]."""
    expected = [x.shape[0], out_features]
    if list(out.shape) == expected and out.dtype == x.dtype and out.is_contiguous():
        return []
    return [f"out must be contiguous {x.dtype} {expected}, got {out.dtype} {list(out.shape)}"]


def _dense_linear_(x: Tensor, weight: Tensor, out: Tensor, exact: bool = True) -> None:
    check(x, weight, out, exact)
    reference.linear_(x.contiguous(), weight, out)


def _dense_linear_cuda_(x: Tensor, weight: Tensor, out: Tensor, exact: bool = True) -> None:
    check(x, weight, out)
    if exact:
        reference.linear_(x.contiguous(), weight, out, tile_rows=CUDA_TILE_ROWS)
    else:
        torch.mm(x, weight.t(), out=out)


def _dense_linear_cpu_(x: Tensor, weight: Tensor, out: Tensor, exact: bool = True) -> None:
    check(x, weight, out, exact)
    rows = x.contiguous()
    if not native.linear_(rows, weight, out):
        reference.linear_(rows, weight, out)


def _dense_linear(x: Tensor, weight: Tensor, exact: bool = True) -> Tensor:
    out = _shape(x, weight, exact)
    _linear_op(x, weight, out, exact)
    return out


def _shape(x: Tensor, weight: Tensor, exact: bool = True) -> Tensor:
    check(x, weight, exact=exact)
    return x.new_empty(x.shape[0], weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    del output
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
    (weight,) = ctx.saved_tensors
    return (grad @ weight if ctx.needs_input_grad[0] else None), None, None


_library.impl("dense_linear_", _dense_linear_, "CompositeExplicitAutograd")
_library.impl("dense_linear_", _dense_linear_cuda_, "CUDA")
_library.impl("dense_linear_", _dense_linear_cpu_, "CPU")
_library.impl("dense_linear_", check, "Meta")
_library.impl("dense_linear", _dense_linear, "CompositeExplicitAutograd")
_library.impl("dense_linear", _shape, "Meta")
torch.library.register_autograd("lorasrv::dense_linear", _backward, setup_context=_setup_context, lib=_library)
