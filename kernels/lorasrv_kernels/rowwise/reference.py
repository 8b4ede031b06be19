"""The specification of `rms_norm`, `rotate_` and `silu_mul`, in float32. No row of a result depends on another."""

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
