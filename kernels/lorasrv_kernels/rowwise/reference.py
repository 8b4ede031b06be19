"""The specification of `rms_norm`, `rotate_`, `silu_mul` and two gradients, in float32.

No row of a result depends on another.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RmsNorm(NamedTuple):
    """Arguments of `rms_norm`."""

    x: Tensor  # [T, I] or [T, H, I]
    weight: Tensor | None  # [I]
    epsilon: float


class RmsNormGrad(NamedTuple):
    """Arguments of `rms_norm_grad`: the incoming gradient, and those of `rms_norm`."""

    grad: Tensor  # the shape of x
    x: Tensor
    weight: Tensor | None
    epsilon: float


class Rotate(NamedTuple):
    """Arguments of `rotate_`."""

    heads: Tensor  # [T, H, D]
    angles: Tensor  # [T, 1, D] float32


class SiluMul(NamedTuple):
    """Arguments of `silu_mul`."""

    gate: Tensor  # [T, I]
    up: Tensor  # [T, I]


class SiluMulGrad(NamedTuple):
    """Arguments of `silu_mul_grad`: the incoming gradient, and those of `silu_mul`."""

    grad: Tensor  # [T, I]
    gate: Tensor
    up: Tensor


def rms_norm(call: RmsNorm) -> Tensor:
    """See `lorasrv_kernels.rowwise.rms_norm`."""
    x, weight, epsilon = call
    wide = x.float()
    inverse = wide.pow(2).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    y = (wide * inverse).to(x.dtype).contiguous()
    return y if weight is None else y.mul_(weight)


def rotate_(call: Rotate) -> None:
    """See `lorasrv_kernels.rowwise.rotate_`."""
    heads, angles = call
    first, second = heads.float().chunk(2, dim=-1)
    cosine, sine = angles.chunk(2, dim=-1)
    heads.copy_(torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1))


def silu_mul(call: SiluMul) -> Tensor:
    """See `lorasrv_kernels.rowwise.silu_mul`."""
    gate, up = call
    wide = gate.float()
    # silu and sigmoid take another path for the last few elements of a tensor, exp does not
    return (wide / wide.neg().exp_().add_(1)).to(gate.dtype).mul_(up).contiguous()


def rms_norm_grad(call: RmsNormGrad) -> Tensor:
    """See `lorasrv_kernels.rowwise.rms_norm_grad`."""
    grad, x, weight, epsilon = call
    wide, incoming = x.float(), grad.float() if weight is None else grad.float() * weight
    inverse = wide.pow(2).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    along = inverse.pow(3) * (wide * incoming).mean(-1, keepdim=True)
    return (inverse * incoming - along * wide).to(x.dtype)


def silu_mul_grad(call: SiluMulGrad) -> Tensor:
    """See `lorasrv_kernels.rowwise.silu_mul_grad`."""
    grad, gate, up = call
    incoming, wide = grad.float(), gate.float()
    sigmoid = wide.sigmoid()
    of_gate = incoming * up * sigmoid * (1 + wide * (1 - sigmoid))
    return torch.cat([of_gate, incoming * wide * sigmoid], dim=1).to(gate.dtype)
