"""Batched LoRA over ragged ranks: every token row with its own adapters, in one call."""

from collections.abc import Sequence

from torch import Tensor

from lorasrv_kernels.batch import SlotBatch
from lorasrv_kernels.lora import op

__all__ = ["lora_apply_", "lora_embed_"]


def lora_apply_(
    y: Tensor,
    x: Tensor,
    arena: Tensor,
    table: Tensor,
    *,
    out_features: Sequence[int],
    slots: SlotBatch,
    bias: Tensor | None = None,
    max_rank: int = 0,
) -> None:
    """In place, per token row and slice: y <- d * y + weight * B (A x) + bias.

    The bias is the slot's own if it has one, else the base's; rows without a slot get the base's and nothing else.

    Args:
        y: [T, O], the base product without its bias, O the sum of `out_features`; changed in place.
        x: [T, I], same dtype as y.
        arena: [N], same dtype as x; the numbers of every slot.
        table: [S, G, 8] int64, one row per slot and slice, columns as in `lorasrv_kernels.table`: A [R, I], B^T [R, O],
            d [O], the rank R (it may be 0) and the bias [O].
        out_features: the G widths of the slices of y, in order.
        slots: which rows use which slot.
        bias: [O], same dtype as y, the bias of the base; None where it has none.
        max_rank: no slot of these rows has a higher rank; it sizes scratch memory on CUDA, where rows of a higher rank
            become NaN. 0: not known, and then CUDA looks for it in the table, which waits for the device.

    A row may name several slots only if none of them has a `d` or a bias and the base has no bias either.

    Raises:
        KernelError: shapes or dtypes break this contract.
    """
    op.lora_apply_(
        y,
        x,
        arena,
        table,
        out_features,
        slots.rows,
        slots.weights,
        slots.tile_slots,
        slots.tile_starts,
        slots.base_rows,
        bias,
        max_rank,
        slots.composed,
        slots.exact,
    )


def lora_embed_(y: Tensor, tokens: Tensor, arena: Tensor, table: Tensor, *, slots: SlotBatch) -> None:
    """In place, per token row: y <- d * y + weight * B A[:, token]. Rows without a slot are not touched.

    Args:
        y: [T, O], the token's row of the embedding; changed in place.
        tokens: [T] int64.
        arena: [N], same dtype as y; the numbers of every slot.
        table: [S, 8] int64, columns as in `lorasrv_kernels.table`: A is stored as [V, R], so that a token's part of it
            is one row; B^T [R, O], d [O] and the rank R.
        slots: which rows use which slot.

    A row may name several slots only if none of them has a `d`.

    Raises:
        KernelError: shapes or dtypes break this contract.
    """
    op.lora_embed_(
        y,
        tokens,
        arena,
        table,
        slots.rows,
        slots.weights,
        slots.tile_slots,
        slots.tile_starts,
        slots.base_rows,
        slots.composed,
        slots.exact,
    )
