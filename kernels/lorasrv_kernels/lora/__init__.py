"""Batched LoRA over ragged ranks: every token row with its own adapters, in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorasrv_kernels.batch import SlotBatch
from lorasrv_kernels.lora import op as _op  # noqa: F401  registers the op
from lorasrv_kernels.lora.reference import ABSENT, TABLE_COLUMNS, scale_at

__all__ = ["ABSENT", "TABLE_COLUMNS", "lora_apply_", "scale_at"]


def lora_apply_(
    y: Tensor, x: Tensor, arena: Tensor, table: Tensor, *, out_features: Sequence[int], slots: SlotBatch
) -> None:
    """In place, per token row and slice: y <- d * y + weight * B (A x). Rows without a slot are not touched.

    Args:
        y: [T, O], the base product without its bias, O the sum of `out_features`; changed in place.
        x: [T, I], same dtype as y.
        arena: [N], same dtype as x; the rank rows of every slot.
        table: [S, G, 4] int64: per slot and slice the offsets of A [R, I], of B^T [R, O] and of d [O] (float32; -1 for
            none), in elements of the arena, and the rank R. A rank may be 0.
        out_features: the G widths of the slices of y, in order.
        slots: which rows use which slot.

    A row may name several slots only if none of them has a `d`.

    Raises:
        KernelError: shapes or dtypes break this contract.
    """
    torch.ops.lorasrv.lora_apply_(
        y, x, arena, table, out_features, slots.rows, slots.weights, slots.tile_slots, slots.tile_starts
    )
