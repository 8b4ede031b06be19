"""Contract of the gradients of the norm and of the gated activation: schemas, checks, default implementations."""

import torch
from torch import Tensor

from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.rowwise import native, reference
from lorasrv_kernels.rowwise.op import check_norm, check_silu_mul

_library = torch.library.Library("lorasrv", "FRAGMENT")
_library.define("rms_norm_grad(Tensor grad, Tensor x, Tensor? weight, float epsilon) -> Tensor")
_library.define("silu_mul_grad(Tensor grad, Tensor gate, Tensor up) -> Tensor")


def check_norm_grad(grad: Tensor, x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """Raises KernelError naming every argument that breaks the contract of `rms_norm_grad`; the result is unset."""
    out = check_norm(x, weight, epsilon)
    _check_grad("rms_norm_grad", grad, x)
    return out


def check_silu_mul_grad(grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Raises KernelError naming every argument that breaks the contract of `silu_mul_grad`; the result is unset."""
    check_silu_mul(gate, up)
    _check_grad("silu_mul_grad", grad, gate)
    return gate.new_empty(len(gate), 2 * gate.shape[1])


def _check_grad(name: str, grad: Tensor, like: Tensor) -> None:
    if grad.shape != like.shape or grad.dtype != like.dtype:
        expected = f"{like.dtype} {list(like.shape)}"
        raise KernelError(f"{name}: grad must be {expected}, got {grad.dtype} {list(grad.shape)}")


def _norm_grad(grad: Tensor, x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    check_norm_grad(grad, x, weight, epsilon)
    return reference.rms_norm_grad(grad, x, weight, epsilon)


def _norm_grad_cpu(grad: Tensor, x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    check_norm_grad(grad, x, weight, epsilon)
    out = native.rms_norm_grad(grad, x, weight, epsilon)
    return reference.rms_norm_grad(grad, x, weight, epsilon) if out is None else out


def _silu_mul_grad(grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    check_silu_mul_grad(grad, gate, up)
    return reference.silu_mul_grad(grad, gate, up)


def _silu_mul_grad_cpu(grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    check_silu_mul_grad(grad, gate, up)
    out = native.silu_mul_grad(grad, gate, up)
    return reference.silu_mul_grad(grad, gate, up) if out is None else out


_library.impl("rms_norm_grad", _norm_grad, "CompositeExplicitAutograd")
_library.impl("rms_norm_grad", _norm_grad_cpu, "CPU")
_library.impl("rms_norm_grad", check_norm_grad, "Meta")
_library.impl("silu_mul_grad", _silu_mul_grad, "CompositeExplicitAutograd")
_library.impl("silu_mul_grad", _silu_mul_grad_cpu, "CPU")
_library.impl("silu_mul_grad", check_silu_mul_grad, "Meta")
