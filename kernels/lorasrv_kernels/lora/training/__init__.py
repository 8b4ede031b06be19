"""The trainable low-rank update: several adapters in one batch, each over its own run of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasrv_kernels.lora.training import op

__all__ = ["LowRank", "lora_update"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """What one adapter trains of one linear layer. Tensors are float32; they may be views of a larger buffer."""

    a: Tensor  # [R, I]
    b: Tensor  # [O, R]
    scale: float
    d: Tensor | None = None  # [O]
    """DoRA's magnitude over its norm; the caller detaches the norm."""


def lora_update(
    y: Tensor,
    x: Tensor,
    *,
    segment_tokens: Sequence[int],
    adapters: Sequence[Sequence[LowRank | None]],
    out_features: Sequence[int],
) -> Tensor:
    """Per segment and slice: d * (y + scale * B (A x)), differentiable with respect to y, x and every A, B and d.

    A segment is a run of token rows of one adapter. Its gradients are sums over its own rows, in an order of their own,
    so training adapters together or apart gives the same numbers.

    Args:
        y: [T, O], the base product without its bias, O the sum of `out_features`; not changed.
        x: [T, I], same dtype as y: the input of the low-rank branch, after dropout if there is any.
        segment_tokens: rows of each segment, one after the other; their sum is T.
        adapters: per segment, what it trains of each slice, or None where it leaves the slice alone.
        out_features: the widths of the slices of y, in order.

    Returns:
        [T, O], the dtype of y, rounded once; sums are float32.

    Raises:
        KernelError: shapes or dtypes break this contract.
    """
    if not segment_tokens and not len(x):
        return y
    none = x.new_empty(0, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    flat = [low_rank for segment in adapters for low_rank in segment]
    widths = [*out_features] * len(adapters)
    in_features = x.shape[-1]
    return op.lora_update(
        y,
        x,
        [none.view(0, in_features) if one is None else one.a for one in flat],
        [none.view(width, 0) if one is None else one.b for one, width in zip(flat, widths, strict=False)],
        [none if one is None or one.d is None else one.d for one in flat],
        [1.0 if one is None else one.scale for one in flat],
        out_features,
        segment_tokens,
    )
