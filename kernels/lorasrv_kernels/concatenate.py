"""Tensors stacked by rows, without a copy where they already lie one after the other. Knows memory, no format."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.cat` along the first dimension; the result may share memory with the tensors, and is then their view.

    Args:
        tensors: one or more, of one dtype, device and row shape.
    """
    if not all(_follows(left, right) for left, right in pairwise(tensors)):
        return torch.cat(list(tensors))
    first = tensors[0]
    return first.as_strided((sum(len(tensor) for tensor in tensors), *first.shape[1:]), first.stride())


def _follows(left: Tensor, right: Tensor) -> bool:
    """Whether the second begins in memory where the first ends."""
    left_storage, right_storage = left.untyped_storage(), right.untyped_storage()
    return (
        (left.dtype, left.device, left.shape[1:]) == (right.dtype, right.device, right.shape[1:])
        and left.is_contiguous()
        and right.is_contiguous()
        and (left_storage.data_ptr(), left_storage.nbytes()) == (right_storage.data_ptr(), right_storage.nbytes())
        and left.storage_offset() + left.numel() == right.storage_offset()
    )
