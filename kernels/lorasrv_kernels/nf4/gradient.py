"""The gradient of the NF4 linear layer by panels of columns, each finished by one product of the library.

    grad_x[:, columns] = grad W[:, columns]

Panels of columns need no sum over panels, so nothing is added or rounded twice. Knows how panels are cut; a device's
own function dequantizes them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lorasrv_kernels.nf4.calls import Nf4DequantizeColumns, Nf4LinearGrad
from lorasrv_kernels.nf4.codes import BLOCK_SIZE
from lorasrv_kernels.workspace import thread_workspace

PANEL_BYTES = 4 << 20
"""Most bytes of dequantized weights at a time on a CPU, if `MIN_COLUMNS` allow it."""

MIN_COLUMNS = 256
"""The incoming gradient is read once per panel; narrower panels spend more time on that than on anything else."""


def linear_grad_by_columns(
    call: Nf4LinearGrad, *, dequantize_columns: Callable[[Nf4DequantizeColumns], None], panel_bytes: int
) -> Tensor:
    """grad W [T, I] of grad [T, O]; I a multiple of 64. Panels depend on O, I and the dtype alone."""
    grad, in_features = call.grad, call.in_features
    num_rows = grad.shape[1]
    result = grad.new_empty(grad.shape[0], in_features)
    step = panel_columns(num_rows, grad.dtype, panel_bytes)
    for column in range(0, in_features, step):
        shape = (num_rows, min(step, in_features - column))
        panel = thread_workspace().take("nf4.columns", shape, grad.dtype, grad.device)
        dequantize_columns(Nf4DequantizeColumns(*call[1:], column, panel))
        torch.mm(grad, panel, out=result[:, column : column + step])
    return result


def panel_columns(num_rows: int, dtype: torch.dtype, panel_bytes: int) -> int:
    """Columns of a panel: whole blocks."""
    fitting = panel_bytes // max(1, num_rows * dtype.itemsize)
    return max(MIN_COLUMNS, fitting // BLOCK_SIZE * BLOCK_SIZE)
