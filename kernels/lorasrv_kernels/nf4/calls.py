"""The arguments of the NF4 ops, as every implementation is given them. Storage is that of `NF4Weight`."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Nf4Dequantize(NamedTuple):
    """Rows from `start_row` on, written into `out`."""

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    offset: Tensor
    out_features: Sequence[int]
    in_features: int
    start_row: int
    out: Tensor  # [rows, I], contiguous


class Nf4DequantizeColumns(NamedTuple):
    """Columns from `start_column` on, all multiples of 64, written into `out`: no op, but what gradients use."""

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    offset: Tensor
    out_features: Sequence[int]
    in_features: int
    start_column: int
    out: Tensor  # [O, columns], contiguous


class Nf4Linear(NamedTuple):
    """x W^T, as a new tensor."""

    x: Tensor  # [T, I]
    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    offset: Tensor
    out_features: Sequence[int]
    exact: bool = True


class Nf4LinearInto(NamedTuple):
    """x W^T, written into `out`."""

    x: Tensor  # [T, I]
    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    offset: Tensor
    out_features: Sequence[int]
    out: Tensor  # [T, O], contiguous
    exact: bool = True


class Nf4LinearGrad(NamedTuple):
    """grad W: the gradient of x."""

    grad: Tensor  # [T, O]
    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    offset: Tensor
    out_features: Sequence[int]
    in_features: int
