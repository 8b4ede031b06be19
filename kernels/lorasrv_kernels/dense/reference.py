"""The specification of a linear layer whose rows do not depend on how many there are.

y[t] = W x[t]. How a matrix product orders its sums depends on its number of rows, so every product here has
`TILE_ROWS` rows: x is cut into tiles, the last one filled up with zeros. At a fixed row count a row's result depends
neither on its place in the tile nor on the other rows.
"""

import torch
from torch import Tensor

from lorasrv_kernels.batch import TILE_ROWS
from lorasrv_kernels.workspace import thread_workspace


def linear_(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Writes x W^T into out, tile by tile.

    Args:
        x: [T, I], contiguous.
        weight: [O, I], contiguous, same dtype.
        out: [T, O], same dtype; rows may be further apart than O (a column range of a wider matrix).
    """
    weight_t = weight.t()
    num_tokens = x.shape[0]
    full = num_tokens - num_tokens % TILE_ROWS
    for row in range(0, full, TILE_ROWS):
        torch.mm(x[row : row + TILE_ROWS], weight_t, out=out[row : row + TILE_ROWS])
    if full < num_tokens:
        _linear_short_tile_(x[full:], weight_t, out[full:])


def _linear_short_tile_(x: Tensor, weight_t: Tensor, out: Tensor) -> None:
    num_tokens = x.shape[0]
    workspace = thread_workspace()
    x_tile = workspace.take("dense.x_tile", (TILE_ROWS, x.shape[1]), x.dtype, x.device)
    y_tile = workspace.take("dense.y_tile", (TILE_ROWS, weight_t.shape[1]), x.dtype, x.device)
    x_tile[:num_tokens] = x
    x_tile[num_tokens:].zero_()
    torch.mm(x_tile, weight_t, out=y_tile)
    out.copy_(y_tile[:num_tokens])
