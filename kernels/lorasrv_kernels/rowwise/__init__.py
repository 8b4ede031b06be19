"""Norms, rotary positions and the gated activation: what lies between the products of a layer, row by row."""

from torch import Tensor

from lorasrv_kernels.rowwise import gradient, op

__all__ = ["rms_norm", "rms_norm_grad", "rotate_", "silu_mul", "silu_mul_grad"]


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon), rounded once, times weight; all but the last product in float32.

    A row's result depends neither on its place nor on the other rows.

    Args:
        x: [T, I] or [T, H, I], any strides; the norm is taken over I.
        weight: [I], contiguous, same dtype; None: the quotient itself.
        epsilon: at least 0.

    Returns:
        A new contiguous tensor of the shape and dtype of x.

    Raises:
        KernelError: shapes or dtypes break this contract.
    """
    return op.rms_norm(x, weight, epsilon)


def rotate_(heads: Tensor, angles: Tensor) -> None:
    """Turns the two halves of every head by its position's angles, in place, in float32.

    Args:
        heads: [T, H, D], any strides, D even; changed in place.
        angles: [T, 1, D] float32: the cosines of a position, then its sines.

    Raises:
        KernelError: shapes or dtypes break this contract.
    """
    op.rotate_(heads, angles)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, the silu in float32 and rounded once before it meets up.

    Args:
        gate, up: [T, I], any strides, of one dtype.

    Returns:
        A new contiguous [T, I].

    Raises:
        KernelError: shapes or dtypes break this contract.
    """
    return op.silu_mul(gate, up)


def rms_norm_grad(grad: Tensor, x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """The gradient of `rms_norm` for x, in float32 inside, as if nothing were rounded on the way.

    Args:
        grad: that of the norm, of the shape and dtype of x.
        x, weight, epsilon: what the norm was given.

    Returns:
        A new contiguous tensor of the shape and dtype of x.

    Raises:
        KernelError: shapes or dtypes break this contract.
    """
    return gradient.rms_norm_grad(grad, x, weight, epsilon)


def silu_mul_grad(grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """The gradients of `silu_mul`, in float32 inside.

    Args:
        grad: that of the product, [T, I].
        gate, up: what it was given.

    Returns:
        A new contiguous [T, 2 I]: of gate, then of up.

    Raises:
        KernelError: shapes or dtypes break this contract.
    """
    return gradient.silu_mul_grad(grad, gate, up)
