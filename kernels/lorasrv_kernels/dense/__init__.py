"""Linear layers in 16 or 32 bit, each row with the same bits whatever its neighbours."""

from torch import Tensor

from lorasrv_kernels.dense import op

__all__ = ["dense_linear"]


def dense_linear(x: Tensor, weight: Tensor, *, out: Tensor | None = None, exact: bool = True) -> Tensor:
    """x W^T; if `exact`, a row's result does not depend on the number of rows or on the other rows.

    Differentiable with respect to x alone, and only without `out`.

    Args:
        x: [T, I], any floating dtype.
        weight: [O, I], contiguous, same dtype.
        out: [T, O], contiguous, same dtype; written and returned if given. Serving passes it, under inference mode.
        exact: whether every number of rows is multiplied in one way. On CUDA another is faster.

    Raises:
        KernelError: shapes or dtypes break this contract.
    """
    if out is None:
        return op.linear(x, weight, exact)
    op.linear_(x, weight, out, exact)
    return out
