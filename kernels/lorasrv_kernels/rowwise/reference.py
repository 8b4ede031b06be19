"""The specification of `rms_norm`, `rotate_`, `silu_mul` and two gradients, in float32.

No row of a result depends on another.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """See `lorasrv_kernels.rowwise.rms_norm`."""
    wide = x.float()
    inverse = wide.pow(2).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    y = (wide * inverse).to(x.dtype).contiguous()
    return y if weight is None else y.mul_(weight)


def rotate_(heads: Tensor, angles: Tensor) -> None:
    """See `lorasrv_kernels.rowwise.rotate_`."""
    first, second = heads.float().chunk(2, dim=-1)
    cosine, sine = angles.chunk(2, dim=-1)
    heads.copy_(torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1))


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """See `lorasrv_kernels.rowwise.silu_mul`."""
    wide = gate.float()
    # silu and sigmoid take another path for the last few elements of a tensor, exp does not
    return (wide / wide.neg().exp_().add_(1)).to(gate.dtype).mul_(up).contiguous()


def rms_norm_grad(grad: Tensor, x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """See `lorasrv_kernels.rowwise.rms_norm_grad`."""
    wide, incoming = x.float(), grad.float() if weight is None else grad.float() * weight
    inverse = wide.pow(2).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    along = inverse.pow(3) * (wide * incoming).mean(-1, keepdim=True)
    return (inverse * incoming - along * wide).to(x.dtype)


def silu_mul_grad(grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """See `lorasrv_kernels.rowwise.silu_mul_grad`."""
    incoming, wide = grad.float(), gate.float()
    sigmoid = wide.sigmoid()
    of_gate = incoming * up * sigmoid * (1 + wide * (1 - sigmoid))
    return torch.cat([of_gate, incoming * wide * sigmoid], dim=1).to(gate.dtype)
