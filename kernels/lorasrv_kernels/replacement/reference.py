"""The specification of weights with rows of their own per slot: a loop over the slots of the batch.

For a token row of slot s, W' is the base's weight W with the rows `ids[s]` (all of them, if there are no ids) replaced:

    embedding    y[t] = W'[token[t]]
    linear       y[t] = W' x[t]
    scale        y[t] = w' * y[t]

The linear products are those of `lorasrv_kernels.dense`, which take rows in tiles of a fixed height, so that a row's
bits do not depend on how many share its weight.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from lorasrv_kernels.dense import dense_linear
from lorasrv_kernels.table import ABSENT, Column, ids_at, matrix_at


class Replaced(NamedTuple):
    """Arguments of each of the three ops: E entries of rows in K tiles, as `SlotBatch` states them."""

    x: Tensor
    """Tokens [T] int64 of an embedding, [T, I] of a linear layer, [T, ..., I] of a scale, which changes it."""
    weight: Tensor  # [V, O], [O, I] or [I]
    arena: Tensor  # [N]
    table: Tensor  # [S, 8] int64
    rows: Tensor  # [E] int64
    tile_slots: Tensor  # [K]
    tile_starts: Tensor  # [K + 1]


def embedding(call: Replaced) -> Tensor:
    """See `lorasrv_kernels.replacement.replaced_embedding`."""
    tokens, weight, arena = call.x, call.weight, call.arena
    out = torch.index_select(weight, 0, tokens)
    for entry, slot_rows in _replacing(call):
        own = matrix_at(arena, entry[Column.ROWS], entry[Column.NUM_ROWS], weight.shape[1])
        if entry[Column.ROW_IDS] == ABSENT:
            out[slot_rows] = own[tokens[slot_rows]]
            continue
        ids = ids_at(arena, entry[Column.ROW_IDS], entry[Column.NUM_ROWS])
        places = torch.searchsorted(ids, tokens[slot_rows].int()).clamp_(max=len(ids) - 1)
        found = ids[places] == tokens[slot_rows]
        out[slot_rows[found]] = own[places[found]]
    return out


def linear(call: Replaced) -> Tensor:
    """See `lorasrv_kernels.replacement.replaced_linear`."""
    x, weight, arena = call.x, call.weight, call.arena
    out = x.new_empty(x.shape[0], weight.shape[0])
    replacing = list(_replacing(call))
    whole = [slot_rows for entry, slot_rows in replacing if entry[Column.ROW_IDS] == ABSENT]
    with_base = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    for slot_rows in whole:
        with_base[slot_rows] = False
    if not whole:
        dense_linear(x, weight, out=out)
    elif bool(with_base.any()):
        out[with_base] = dense_linear(x[with_base], weight)
    for entry, slot_rows in replacing:
        own = matrix_at(arena, entry[Column.ROWS], entry[Column.NUM_ROWS], weight.shape[1])
        product = dense_linear(x[slot_rows], own)
        if entry[Column.ROW_IDS] == ABSENT:
            out[slot_rows] = product
        else:
            ids = ids_at(arena, entry[Column.ROW_IDS], entry[Column.NUM_ROWS]).long()
            out[slot_rows[:, None], ids] = product
    return out


def scale_(call: Replaced) -> None:
    """See `lorasrv_kernels.replacement.replaced_scale_`."""
    y, weight, arena = call.x, call.weight, call.arena
    own = [
        (slot_rows, y[slot_rows] * matrix_at(arena, entry[Column.ROWS], 1, weight.shape[0])[0])
        for entry, slot_rows in _replacing(call)
    ]
    y.mul_(weight)
    for slot_rows, scaled in own:
        y[slot_rows] = scaled


def _replacing(call: Replaced) -> Iterator[tuple[Sequence[int], Tensor]]:
    """The table's row and the token rows of every slot of the batch that replaces something."""
    entries = call.table.tolist()
    starts = call.tile_starts.tolist()
    for slot, tiles in groupby(enumerate(call.tile_slots.tolist()), key=lambda tile: tile[1]):
        indices = [index for index, _ in tiles]
        if entries[slot][Column.ROWS] != ABSENT:
            yield entries[slot], call.rows[starts[indices[0]] : starts[indices[-1] + 1]]
