"""The specification of a linear layer whose rows do not depend on how many there are.

y[t] = W x[t]. How a matrix product orders its sums depends on its number of rows, so every product here has
`TILE_ROWS` rows: x is cut into tiles, the last one filled up with zeros. At a fixed row count a row's result depends
neither on its place in the tile nor on the other rows.

One exception is known: below a dozen output columns MKL's float32 product follows the alignment of each row in memory
(16 bytes). W therefore has at least `MIN_OUT_FEATURES` rows in every product; missing ones are zero.
"""

import torch
from torch import Tensor

from lorasrv_kernels.batch import TILE_ROWS
from lorasrv_kernels.workspace import thread_workspace

MIN_OUT_FEATURES = 16
"""Fewest rows of W in one product."""


def linear_(x: Tensor, weight: Tensor, out: Tensor, *, tile_rows: int = TILE_ROWS) -> None:
    """Writes x W^T into out, tile by tile.

    Args:
        x: [T, I], contiguous.
        weight: [O, I], contiguous, same dtype.
        out: [T, O], same dtype; rows may be further apart than O (a column range of a wider matrix).
        tile_rows: height of a tile.
    """
    num_tokens, out_features = out.shape
    narrow = out_features < MIN_OUT_FEATURES
    weight_t = (_widened(weight) if narrow else weight).t()
    full = 0 if narrow else num_tokens - num_tokens % tile_rows
    for row in range(0, full, tile_rows):
        torch.mm(x[row : row + tile_rows], weight_t, out=out[row : row + tile_rows])
    for row in range(full, num_tokens, tile_rows):
        _copied_tile_(x[row : row + tile_rows], weight_t, out[row : row + tile_rows], tile_rows)


def _copied_tile_(x: Tensor, weight_t: Tensor, out: Tensor, tile_rows: int) -> None:
    """A tile that is short, or whose result is narrower than the product."""
    num_tokens, out_features = out.shape
    workspace = thread_workspace()
    x_tile = workspace.take("dense.x_tile", (tile_rows, x.shape[1]), x.dtype, x.device)
    y_tile = workspace.take("dense.y_tile", (tile_rows, weight_t.shape[1]), x.dtype, x.device)
    x_tile[:num_tokens] = x
    x_tile[num_tokens:].zero_()
    torch.mm(x_tile, weight_t, out=y_tile)
    out.copy_(y_tile[:num_tokens, :out_features])


def _widened(weight: Tensor) -> Tensor:
    out_features, in_features = weight.shape
    shape = (MIN_OUT_FEATURES, in_features)
    wide = thread_workspace().take("dense.weight", shape, weight.dtype, weight.device)
    wide[:out_features] = weight
    wide[out_features:].zero_()
    return wide
