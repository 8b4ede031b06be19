"""The specification of NF4's way back, and of the linear layer over it, in plain PyTorch.

    scale = nested_code[absmax] * nested_absmax + offset       float32, rounded after each step
    weight = level[code] * scale                               float32, then rounded once to the asked dtype
    y[t] = W x[t]                                              by the tile rule of `lorasrv_kernels.dense`

The linear layer never holds more of W than one panel: a run of rows of at most `PANEL_BYTES`, or one row.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from lorasrv_kernels.dense.reference import linear_
from lorasrv_kernels.nf4.calls import Nf4Dequantize, Nf4LinearGrad, Nf4LinearInto
from lorasrv_kernels.nf4.codes import BLOCK_SIZE, NESTED_BLOCK_SIZE, level_pairs, nested_codes
from lorasrv_kernels.nf4.container import slice_starts
from lorasrv_kernels.workspace import thread_workspace

PANEL_BYTES = 4 << 20
"""Most bytes of dequantized weights at a time; a single row may be longer."""

_RUN_BLOCKS = 1 << 10


def dequantize_(call: Nf4Dequantize) -> None:
    """Writes the rows from `start_row` on into out [rows, I], contiguous, float32, bfloat16 or float16."""
    packed, absmax, nested_absmax, offset, out_features, in_features, start_row, out = call
    stop_row = start_row + out.shape[0]
    for index, (start, stop) in enumerate(pairwise(slice_starts(tuple(out_features), in_features))):
        first_row, last_row = max(start_row, start.row), min(stop_row, stop.row)
        if first_row < last_row:
            first = (first_row - start.row) * in_features
            num_elements = (last_row - first_row) * in_features
            scales = _scales(
                absmax[start.block : stop.block],
                nested_absmax[start.nested : stop.nested],
                offset[index],
                first // BLOCK_SIZE,
                -(-(first + num_elements) // BLOCK_SIZE),
            )
            rows = out[first_row - start_row : last_row - start_row]
            _dequantize_elements_(packed[start.byte : stop.byte], scales, first, rows.view(-1))


def _scales(absmax: Tensor, nested_absmax: Tensor, offset: Tensor, first: int, stop: int) -> Tensor:
    """Scales of the blocks [first, stop) of one slice: [blocks] float32, scratch."""
    # whole nested blocks, so that one product serves them all; what is beyond the slice is never read
    nested, nested_stop = first // NESTED_BLOCK_SIZE, -(-stop // NESTED_BLOCK_SIZE)
    codes = absmax[nested * NESTED_BLOCK_SIZE : stop]
    workspace = thread_workspace()
    scales = workspace.take("nf4.scales", (nested_stop - nested, NESTED_BLOCK_SIZE), torch.float32, absmax.device)
    positions = workspace.take("nf4.positions", (len(codes),), torch.int32, absmax.device)
    positions.copy_(codes)
    torch.index_select(nested_codes(absmax.device), 0, positions, out=scales.view(-1)[: len(codes)])
    scales.mul_(nested_absmax[nested:nested_stop, None]).add_(offset)
    return scales.view(-1)[first - nested * NESTED_BLOCK_SIZE : len(codes)]


def _dequantize_elements_(packed: Tensor, scales: Tensor, first: int, out: Tensor) -> None:
    """Writes the elements of one slice from `first` on into out [n]; scales begin with the block of `first`."""
    stop = first + out.numel()
    first_block = first // BLOCK_SIZE
    workspace = thread_workspace()
    for block in range(first_block, first_block + len(scales), _RUN_BLOCKS):
        run_scales = scales[block - first_block : block - first_block + _RUN_BLOCKS]
        codes = packed[block * BLOCK_SIZE // 2 : (block + len(run_scales)) * BLOCK_SIZE // 2]
        weights = workspace.take("nf4.weights", (len(run_scales), BLOCK_SIZE), torch.float32, packed.device)
        positions = workspace.take("nf4.positions", (len(codes),), torch.int32, packed.device)
        positions.copy_(codes)
        pairs = weights.view(-1).view(torch.int64)[: len(codes)]
        torch.index_select(level_pairs(packed.device), 0, positions, out=pairs)
        weights.mul_(run_scales[:, None])
        start = block * BLOCK_SIZE
        lower, upper = max(first, start), min(stop, start + weights.numel())
        out[lower - first : upper - first] = weights.view(-1)[lower - start : upper - start]


def linear_by_panels_(call: Nf4LinearInto, *, dequantize: Callable[[Nf4Dequantize], None] = dequantize_) -> None:
    """Writes x W^T into out [T, O]. Panels depend on O, I and the dtype alone."""
    x, out = call.x.contiguous(), call.out
    in_features, num_rows = x.shape[1], out.shape[1]
    step = panel_rows(in_features, x.dtype)
    for row in range(0, num_rows, step):
        panel = _panel(min(step, num_rows - row), in_features, x)
        dequantize(Nf4Dequantize(*call[1:6], in_features, row, panel))
        linear_(x, panel, out[:, row : row + step])


def linear_by_library_(call: Nf4LinearInto, *, dequantize: Callable[[Nf4Dequantize], None] = dequantize_) -> None:
    """As `linear_by_panels_`, a product of the library a panel, in whatever order it adds up so many tokens."""
    x, out = call.x.contiguous(), call.out
    in_features, num_rows = x.shape[1], out.shape[1]
    step = 2 * panel_rows(in_features, x.dtype)
    for row in range(0, num_rows, step):
        panel = _panel(min(step, num_rows - row), in_features, x)
        dequantize(Nf4Dequantize(*call[1:6], in_features, row, panel))
        torch.mm(x, panel.t(), out=out[:, row : row + step])


def linear_grad_by_panels(call: Nf4LinearGrad, *, dequantize: Callable[[Nf4Dequantize], None] = dequantize_) -> Tensor:
    """grad W [T, I] of grad [T, O]; a panel's part has the dtype of grad, their sum is float32, rounded once."""
    grad, in_features = call.grad, call.in_features
    num_rows = grad.shape[1]
    step = panel_rows(in_features, grad.dtype)
    total: Tensor | None = None
    for row in range(0, num_rows, step):
        panel = _panel(min(step, num_rows - row), in_features, grad)
        dequantize(Nf4Dequantize(*call[1:], row, panel))
        part = grad[:, row : row + step] @ panel
        if step >= num_rows:
            return part
        total = part.float() if total is None else total.add_(part)
    return grad.new_zeros(grad.shape[0], in_features) if total is None else total.to(grad.dtype)


def panel_rows(in_features: int, dtype: torch.dtype) -> int:
    """Rows of a panel."""
    return max(1, PANEL_BYTES // max(1, in_features * dtype.itemsize))


def _panel(rows: int, in_features: int, like: Tensor) -> Tensor:
    return thread_workspace().take("nf4.panel", (rows, in_features), like.dtype, like.device)
