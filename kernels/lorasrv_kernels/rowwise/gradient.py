"""Contract of the gradients of the norm and of the gated activation: checks, shapes, and who serves."""

from torch import Tensor

from lorasrv_kernels import operators
from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.rowwise import native, reference
from lorasrv_kernels.rowwise.op import check_norm, check_silu_mul
from lorasrv_kernels.rowwise.reference import RmsNorm, RmsNormGrad, SiluMul, SiluMulGrad


def check_norm_grad(call: RmsNormGrad) -> None:
    """Raises KernelError naming every argument that breaks the contract of `rms_norm_grad`."""
    check_norm(RmsNorm(*call[1:]))
    _check_grad("rms_norm_grad", call.grad, call.x)


def check_silu_mul_grad(call: SiluMulGrad) -> None:
    """Raises KernelError naming every argument that breaks the contract of `silu_mul_grad`."""
    check_silu_mul(SiluMul(*call[1:]))
    _check_grad("silu_mul_grad", call.grad, call.gate)


def _check_grad(name: str, grad: Tensor, like: Tensor) -> None:
    if grad.shape != like.shape or grad.dtype != like.dtype:
        expected = f"{like.dtype} {list(like.shape)}"
        raise KernelError(f"{name}: grad must be {expected}, got {grad.dtype} {list(grad.shape)}")


def _silu_mul_grad_shape(call: SiluMulGrad) -> Tensor:
    return call.gate.new_empty(len(call.gate), 2 * call.gate.shape[1])


rms_norm_grad = operators.define(
    "rms_norm_grad",
    RmsNormGrad,
    reference=reference.rms_norm_grad,
    check=check_norm_grad,
    shape=operators.like_first,
    cpu=native.rms_norm_grad,
)
silu_mul_grad = operators.define(
    "silu_mul_grad",
    SiluMulGrad,
    reference=reference.silu_mul_grad,
    check=check_silu_mul_grad,
    shape=_silu_mul_grad_shape,
    cpu=native.silu_mul_grad,
)
