"""The specification of `rotate_` and `silu_mul`, in float32. Every number of a result is computed by itself."""

import torch
from torch import Tensor


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
