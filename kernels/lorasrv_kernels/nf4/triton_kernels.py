"""NF4 on CUDA in Triton, on bitsandbytes' own bytes; requires I % 64 == 0, so that no block lies in two rows.

A few token rows meet the codes themselves (`triton_linear`), many meet dequantized chunks through the library.

Knows tensors that passed the op's checks. Nothing here has been timed on a GPU.
"""

import torch
from torch import Tensor

from lorasrv_kernels.nf4.calls import Nf4Dequantize, Nf4LinearGrad, Nf4LinearInto
from lorasrv_kernels.nf4.gradient import linear_grad_by_columns
from lorasrv_kernels.nf4.triton_dequantize import dequantize_, dequantize_columns_
from lorasrv_kernels.nf4.triton_linear import fused_linear_

__all__ = ["dequantize_", "dequantize_columns_", "linear_", "linear_grad"]

MAX_FUSED_TOKENS = 64
"""Up to so many token rows the product reads the codes themselves; beyond, if a row's bits may then differ, dequantized
chunks go to the library."""

MAX_PLANE_TOKENS = 512
"""Most token rows whose sums over splits are kept at a time."""

CHUNK_BYTES = 24 << 20
"""Most bytes of dequantized weights at a time, or one row; chosen to stay in the 50 MB of an H100's L2."""


def linear_grad(call: Nf4LinearGrad) -> Tensor:
    """grad W [T, I] of grad [T, O]."""
    return linear_grad_by_columns(call, dequantize_columns=dequantize_columns_, panel_bytes=CHUNK_BYTES)


def linear_(call: Nf4LinearInto) -> None:
    """Writes x W^T into out [T, O]."""
    x, out = call.x.contiguous(), call.out
    num_tokens, num_rows = out.shape
    if not num_tokens or not num_rows:
        return
    if call.exact or num_tokens <= MAX_FUSED_TOKENS:
        for row in range(0, num_tokens, MAX_PLANE_TOKENS):
            rows = slice(row, row + MAX_PLANE_TOKENS)
            fused_linear_(call._replace(x=x[rows], out=out[rows]))
        return
    in_features = x.shape[1]
    step = max(1, min(num_rows, CHUNK_BYTES // (in_features * x.element_size())))
    chunk = x.new_empty(step, in_features)
    for row in range(0, num_rows, step):
        weights = chunk[: min(step, num_rows - row)]
        dequantize_(Nf4Dequantize(*call[1:6], in_features, row, weights))
        torch.mm(x, weights.T, out=out[:, row : row + step])
