"""Weights of which an adapter has rows of its own: embedding, output head and norms, each token row with its slot's."""

from torch import Tensor

from lorasrv_kernels.batch import SlotBatch
from lorasrv_kernels.replacement import op

__all__ = ["replaced_embedding", "replaced_linear", "replaced_scale_"]


def replaced_embedding(tokens: Tensor, weight: Tensor, arena: Tensor, table: Tensor, *, slots: SlotBatch) -> Tensor:
    """Each token's row of its slot's embedding: a new [T, O].

    Args:
        tokens: [T] int64.
        weight: [V, O], the base's embedding.
        arena: [N], same dtype; the numbers of every slot.
        table: [S, 8] int64, columns as in `lorasrv_kernels.table`: the rows that stand in place of the base's.
        slots: which token rows use which slot; at most one each.

    Raises:
        KernelError: shapes or dtypes break this contract.
    """
    return op.embedding(tokens, weight, arena, table, slots.rows, slots.tile_slots, slots.tile_starts)


def replaced_linear(x: Tensor, weight: Tensor, arena: Tensor, table: Tensor, *, slots: SlotBatch) -> Tensor:
    """x W^T with each row's own W: a new [T, O], a row's bits independent of the other rows.

    A weight that a slot replaces as a whole is read once for all of the slot's rows.

    Args:
        x: [T, I].
        weight: [O, I], contiguous, same dtype: the base's.
        arena: [N], same dtype; the numbers of every slot.
        table: [S, 8] int64, columns as in `lorasrv_kernels.table`: the rows that stand in place of the base's.
        slots: which rows of x use which slot; at most one each.

    Raises:
        KernelError: shapes or dtypes break this contract.
    """
    return op.linear(x, weight, arena, table, slots.rows, slots.tile_slots, slots.tile_starts)


def replaced_scale_(y: Tensor, weight: Tensor, arena: Tensor, table: Tensor, *, slots: SlotBatch) -> None:
    """In place: y <- y * w with each row's own w.

    Args:
        y: [T, ..., I]; changed in place.
        weight: [I], same dtype: the base's.
        arena: [N], same dtype; the numbers of every slot.
        table: [S, 8] int64, columns as in `lorasrv_kernels.table`: one row [I] that stands in place of the base's.
        slots: which rows use which slot; at most one each.

    Raises:
        KernelError: shapes or dtypes break this contract.
    """
    op.scale_(y, weight, arena, table, slots.rows, slots.tile_slots, slots.tile_starts)
