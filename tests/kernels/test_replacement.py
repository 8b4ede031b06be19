"""Replaced weights: against the weight written out for each slot, and independent of neighbours."""

import pytest
import torch
from lorasrv_kernels.batch import NO_SLOT, SlotBatch
from lorasrv_kernels.replacement import replaced_embedding, replaced_linear, replaced_scale_
from lorasrv_kernels.table import ABSENT, ABSENT_ROW, Column, ids_at
from torch import Tensor

VOCAB, WIDTH = 40, 33
IDS = {0: None, 1: [0, 7, 39], 2: [], 3: [5]}
"""Slot -> the ids of its rows: None is all of them, [] is a slot that replaces nothing."""
SLOTS = [0, 1, 2, 3, NO_SLOT, 1, 0, 0, 3, NO_SLOT] * 4


class Slots:
    """A base weight, and four slots that replace all, some, none and one of its rows."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(3)
        self.weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype)
        self.arena = torch.full((8192,), torch.nan, dtype=dtype)
        self.table = torch.tensor(ABSENT_ROW).repeat(len(IDS), 1)
        self.whole = {NO_SLOT: self.weight}
        end = 32
        for slot, ids in IDS.items():
            count = VOCAB if ids is None else len(ids)
            rows = torch.randn(count, WIDTH, generator=generator).to(dtype)
            self.whole[slot] = self.weight.clone()
            self.whole[slot][slice(None) if ids is None else ids] = rows
            if not count:
                continue
            self.table[slot, [Column.ROWS, Column.NUM_ROWS]] = torch.tensor([end, count])
            self.arena[end : end + rows.numel()] = rows.flatten()
            end += -(-rows.numel() // 32) * 32
            if ids is not None:
                self.table[slot, Column.ROW_IDS] = end
                ids_at(self.arena, end, count).copy_(torch.tensor(ids))
                end += 32


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
def test_embedding_looks_up_each_slots_own_row(dtype: torch.dtype) -> None:
    slots = Slots(dtype)
    tokens = torch.arange(len(SLOTS)) * 7 % VOCAB
    batch = SlotBatch.from_slots(SLOTS)
    result = replaced_embedding(tokens, slots.weight, slots.arena, slots.table, slots=batch)
    expected = torch.stack([slots.whole[slot][token] for slot, token in zip(SLOTS, tokens.tolist(), strict=True)])
    assert torch.equal(result, expected)


@DTYPES
def test_linear_multiplies_with_each_slots_own_weight(dtype: torch.dtype) -> None:
    slots = Slots(dtype)
    x = torch.randn(len(SLOTS), WIDTH).to(dtype)
    result = replaced_linear(x, slots.weight, slots.arena, slots.table, slots=SlotBatch.from_slots(SLOTS))
    expected = torch.stack([slots.whole[slot].double() @ row for slot, row in zip(SLOTS, x.double(), strict=True)])
    # sums of 33 products in the library's order, one rounding to the dtype
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance * 10)


@DTYPES
@pytest.mark.parametrize("shape", [(WIDTH,), (3, WIDTH)], ids=["rows", "heads"])
def test_scale_multiplies_with_each_slots_own_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    slots = Slots(dtype)
    slots.table[:, Column.NUM_ROWS].clamp_(max=1)
    slots.table[:, Column.ROW_IDS] = ABSENT
    weight = slots.weight[0].clone()
    y = torch.randn(len(SLOTS), *shape).to(dtype)
    expected = torch.stack([row * scale_of(slots, slot, weight) for row, slot in zip(y, SLOTS, strict=True)])
    replaced_scale_(y, weight, slots.arena, slots.table, slots=SlotBatch.from_slots(SLOTS))
    assert torch.equal(y, expected)


def scale_of(slots: Slots, slot: int, weight: Tensor) -> Tensor:
    offset = ABSENT if slot == NO_SLOT else int(slots.table[slot, Column.ROWS])
    return weight if offset == ABSENT else slots.arena[offset : offset + WIDTH]


@DTYPES
def test_neighbours_change_no_bit(dtype: torch.dtype) -> None:
    slots = Slots(dtype)
    x = torch.randn(len(SLOTS), WIDTH).to(dtype)
    mixed = replaced_linear(x, slots.weight, slots.arena, slots.table, slots=SlotBatch.from_slots(SLOTS))
    for row, slot in enumerate(SLOTS):
        alone = replaced_linear(
            x[row : row + 1], slots.weight, slots.arena, slots.table, slots=SlotBatch.from_slots([slot])
        )
        assert torch.equal(alone[0], mixed[row])


def test_every_breach_of_the_contract_is_named() -> None:
    slots = Slots(torch.float32)
    batch = SlotBatch.from_slots([0])
    with pytest.raises(ValueError, match=r"arena must be 1-D.*x must be \[T, I\]"):
        replaced_linear(torch.zeros(1, 5), slots.weight, slots.arena.half(), slots.table, slots=batch)
    with pytest.raises(ValueError, match=r"table must be int64 \[S, 8\].*tokens must be int64"):
        replaced_embedding(torch.zeros(1), slots.weight, slots.arena, slots.table[:, :4], slots=batch)
    with pytest.raises(ValueError, match=r"y must be"):
        replaced_scale_(torch.zeros(1, 5), slots.weight[0], slots.arena, slots.table, slots=batch)


def test_opcheck() -> None:
    slots = Slots(torch.float32)
    batch = SlotBatch.from_slots([0, 3, NO_SLOT])
    tables = (slots.arena, slots.table, batch.rows, batch.tile_slots, batch.tile_starts)
    ops = torch.ops.lorasrv
    torch.library.opcheck(ops.replaced_embedding.default, (torch.tensor([1, 5, 7]), slots.weight, *tables))
    torch.library.opcheck(ops.replaced_linear.default, (torch.randn(3, WIDTH), slots.weight, *tables))
    slots.table[:, Column.NUM_ROWS].clamp_(max=1)
    torch.library.opcheck(ops.replaced_scale_.default, (torch.randn(3, WIDTH), slots.weight[0].clone(), *tables))
