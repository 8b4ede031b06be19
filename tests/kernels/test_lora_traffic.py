"""The count of what an update reads, against what it reads; what it must not depend on."""

import pytest
import torch
from lora_arena import RANKS, Arena, popularity
from lorasrv_kernels.batch import SlotBatch
from lorasrv_kernels.lora import lora_apply_, reference
from lorasrv_kernels.lora.reference import LoraApply
from lorasrv_kernels.lora.traffic import Traffic, update_traffic
from lorasrv_kernels.table import ABSENT, ABSENT_ROW, Column

IN, OUT = 100, [96, 63]
KINDS = ["distinct", "uniform", "zipf", "identical", "skewed", "base only"]


def count(arena: Arena, slots: list[int]) -> Traffic:
    batch = SlotBatch.from_slots(slots)
    return update_traffic(arena.table, batch, in_features=IN, out_features=OUT, dtype=arena.data.dtype)


def apply(arena: Arena, slots: list[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(len(slots), IN, generator=generator).to(arena.data.dtype)
    y = torch.zeros(len(slots), sum(OUT), dtype=arena.data.dtype)
    batch = SlotBatch.from_slots(slots)
    lora_apply_(y, x, arena.data, arena.table, out_features=OUT, slots=batch)
    return y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_count_is_what_the_specification_reads(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena, slots = Arena(IN, OUT, dtype), popularity(kind, 40)
    read: list[torch.Tensor] = []
    for name in ("matrix_at", "floats_at"):
        original = getattr(reference, name)
        monkeypatch.setattr(reference, name, lambda *where, of=original: read.append(of(*where)) or read[-1])
    batch = SlotBatch.from_slots(slots)
    tiles = (batch.rows, batch.weights, batch.tile_slots, batch.tile_starts, batch.base_rows, None)
    y, x = torch.zeros(40, sum(OUT), dtype=dtype), torch.randn(40, IN).to(dtype)
    reference.lora_apply_(LoraApply(y, x, arena.data, arena.table, OUT, *tiles))
    assert count(arena, slots).num_bytes == sum(part.nbytes for part in read)
    assert count(arena, slots).rank_rows == sum(part.shape[0] for part in read if part.ndim == 2) // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_is_not_counted_is_not_read(dtype: torch.dtype) -> None:
    """Everything the batch does not use is NaN, and the table's other rows point far outside."""
    arena, slots = Arena(IN, OUT, dtype), [0, 3, -1, 0, 3]
    expected = apply(arena, slots)
    kept = torch.full_like(arena.data, torch.nan)
    num_bytes = 0
    for slot in (0, 3):
        for (rank, width), entry in zip(zip(RANKS[slot], OUT, strict=True), arena.table[slot].tolist(), strict=True):
            floats = 4 // dtype.itemsize * width
            lengths = {Column.A: rank * IN, Column.B_T: rank * width, Column.D: floats, Column.BIAS: floats}
            for column, length in lengths.items():
                if entry[column] != ABSENT:
                    kept[entry[column] : entry[column] + length] = arena.data[entry[column] : entry[column] + length]
                    num_bytes += length * dtype.itemsize
    arena.data = kept
    arena.table[[1, 2, 4]] = 1 << 60
    assert torch.equal(apply(arena, slots), expected)
    assert count(arena, slots).num_bytes == num_bytes


def table(ranks: list[int], *, with_d: bool = False) -> torch.Tensor:
    """One slot per rank, one module of 96 x 100."""
    rows = torch.tensor(ABSENT_ROW).repeat(len(ranks), 1, 1)
    start = 0
    for row, rank in zip(rows[:, 0], ranks, strict=True):
        row[Column.A], row[Column.B_T], row[Column.RANK] = start, start + rank * IN, rank
        start += rank * (IN + 96)
        if with_d:
            row[Column.D], start = start, start + 2 * 96
    return rows


def count_in(rows: torch.Tensor, slots: list[int]) -> Traffic:
    batch = SlotBatch.from_slots(slots)
    return update_traffic(rows, batch, in_features=IN, out_features=[96], dtype=torch.bfloat16)


def test_a_registered_adapter_of_rank_128_costs_the_others_nothing() -> None:
    slots = [index % 8 for index in range(32)]
    alone, beside = count_in(table([8] * 8), slots), count_in(table([8] * 8 + [128]), slots)
    assert alone == beside == Traffic(rank_rows=8 * 8, num_bytes=8 * 8 * (IN + 96) * 2)
    assert count_in(table([8] * 8 + [128]), [*slots, 8]).rank_rows == alone.rank_rows + 128


def test_dora_reads_the_rows_of_lora_and_its_scale() -> None:
    ranks, slots = [8, 16, 32, 0], [0, 1, 2, 3, 0, 1]
    lora, dora = count_in(table(ranks), slots), count_in(table(ranks, with_d=True), slots)
    assert dora.rank_rows == lora.rank_rows == 56
    assert dora.num_bytes - lora.num_bytes == 4 * 96 * 4


def test_a_thousand_registered_adapters_cost_what_eight_do() -> None:
    ranks = [8, 16, 32, 8, 16, 32, 8, 16]
    many = [3, 124, 260, 390, 527, 640, 765, 999]
    few = table([ranks[slot % 8] for slot in many])
    assert count_in(table(ranks * 125), many) == count_in(few, list(range(8))) == count_in(few, list(range(8)) * 2)


def test_a_tile_reads_its_slot_once_however_many_rows_it_has() -> None:
    rows = table([8])
    assert count_in(rows, [0] * 16) == count_in(rows, [0])
    assert count_in(rows, [0] * 17).rank_rows == 16
    assert count_in(rows, [-1] * 5) == Traffic()
