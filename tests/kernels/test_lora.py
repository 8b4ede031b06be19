"""Batched LoRA: against a dense formula, over ragged ranks and popularities, and independent of neighbours."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lora_arena import Arena, popularity, with_tail
from lorasrv_kernels.batch import NO_SLOT, TILE_ROWS, SlotBatch
from lorasrv_kernels.cpu.isa import Isa, widest_isa
from lorasrv_kernels.lora import lora_apply_, lora_embed_, native, reference
from lorasrv_kernels.lora.reference import LoraApply
from lorasrv_kernels.table import ABSENT, Column

VOCAB = 40


Update = Callable[..., Any]


def natively(call: LoraApply, *, isa: Isa) -> None:
    assert native.lora_apply_(call, isa=isa)


def by_op(call: LoraApply) -> None:
    torch.ops.lorasrv.lora_apply_(*call)


def updates(dtype: torch.dtype) -> dict[str, Update]:
    """The implementations that this machine can run, by name."""
    found: dict[str, Update] = {"op": by_op, "reference": reference.lora_apply_}
    widest = widest_isa()
    if widest is not None and dtype != torch.float16:
        # what is wider than AVX-512 runs as AVX-512
        found |= {isa.name: partial(natively, isa=isa) for isa in Isa if isa <= min(widest, Isa.AVX512)}
    return found


def apply(
    arena: Arena,
    y: torch.Tensor,
    x: torch.Tensor,
    slots: list[int],
    out_features: list[int],
    bias: torch.Tensor | None = None,
    *,
    update: Update = by_op,
) -> torch.Tensor:
    result = y.clone()
    batch = SlotBatch.from_slots(slots)
    tiles = (batch.rows, batch.weights, batch.tile_slots, batch.tile_starts, batch.base_rows)
    update(LoraApply(result, x, arena.data, arena.table, out_features, *tiles, bias))
    return result


@pytest.mark.parametrize("kind", ["distinct", "uniform", "zipf", "identical", "skewed", "base only"])
@pytest.mark.parametrize("tokens", [1, 16, 63])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_equals_the_dense_formula(kind: str, tokens: int, dtype: torch.dtype, with_bias: bool) -> None:
    out_features = [96, 63]
    arena = Arena(100, out_features, dtype)
    x, y = torch.randn(tokens, 100).to(dtype), torch.randn(tokens, sum(out_features)).to(dtype)
    bias = torch.randn(sum(out_features)).to(dtype) if with_bias else None
    slots = popularity(kind, tokens)
    expected = y.double()
    for row, slot in enumerate(slots):
        start = 0
        for piece, width in enumerate(out_features):
            columns = slice(start, start + width)
            own_bias = None
            if slot != NO_SLOT:
                update, d, own_bias = arena.dense(slot, piece, 100, width)
                expected[row, columns] = d * expected[row, columns] + update @ x[row].double()
            if own_bias is not None:
                expected[row, columns] += own_bias
            elif bias is not None:
                expected[row, columns] += bias[columns].double()
            start += width
    # one rounding to the dtype at the end; sums in fp32 over at most 128 ranks
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for update in updates(dtype).values():
        actual = apply(arena, y, x, slots, out_features, bias, update=update).double()
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("tokens", [1, 16, 63])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_embedding_equals_the_dense_formula(tokens: int, dtype: torch.dtype) -> None:
    arena = Arena(VOCAB, [96], dtype, transposed_a=True)
    ids, y = torch.arange(tokens) * 7 % VOCAB, torch.randn(tokens, 96).to(dtype)
    slots = popularity("uniform", tokens)
    expected = y.double()
    for row, slot in enumerate(slots):
        if slot != NO_SLOT:
            update, d, _ = arena.dense(slot, 0, VOCAB, 96)
            expected[row] = d * expected[row] + update[:, ids[row]]
    arena.table[:, :, Column.BIAS] = ABSENT
    lora_embed_(y, ids, arena.data, arena.table[:, 0], slots=SlotBatch.from_slots(slots))
    # one rounding to the dtype at the end
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 4e-3}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance * 10)


def test_neighbours_change_no_bit_of_an_embedding() -> None:
    arena = Arena(VOCAB, [96], torch.float32, transposed_a=True)
    arena.table[:, :, Column.BIAS] = ABSENT
    ids, y = torch.arange(63) * 7 % VOCAB, torch.randn(63, 96)
    slots = popularity("uniform", 63)
    mixed = y.clone()
    lora_embed_(mixed, ids, arena.data, arena.table[:, 0], slots=SlotBatch.from_slots(slots))
    for row in range(63):
        one = slice(row, row + 1)
        lora_embed_(y[one], ids[one], arena.data, arena.table[:, 0], slots=SlotBatch.from_slots(slots[one]))
    assert torch.equal(y, mixed)


@pytest.mark.parametrize("in_features", [63, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_neighbours_change_no_bit(dtype: torch.dtype, in_features: int) -> None:
    out_features = [96, 64]
    arena = Arena(in_features, out_features, dtype)
    x, y = torch.randn(100, in_features).to(dtype), torch.randn(100, 160).to(dtype)
    slots = popularity("uniform", 100)
    bias = torch.randn(160).to(dtype)
    for update in updates(dtype).values():
        mixed = apply(arena, y, x, slots, out_features, bias, update=update)
        for row in range(100):
            one = slice(row, row + 1)
            alone = apply(arena, y[one], x[one], slots[one], out_features, bias, update=update)
            assert torch.equal(alone, mixed[one])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_wide_instruction_sets_give_the_same_bits(dtype: torch.dtype) -> None:
    found = updates(dtype)
    if Isa.AVX512.name not in found:
        pytest.skip("no AVX-512, or native library not built")
    arena = Arena(100, [96, 63], dtype)
    x, y = torch.randn(63, 100).to(dtype), torch.randn(63, 159).to(dtype)
    slots = popularity("uniform", 63)
    results = [apply(arena, y, x, slots, [96, 63], update=found[isa.name]) for isa in (Isa.AVX2, Isa.AVX512)]
    assert torch.equal(*results)


def test_threads_change_no_bit(num_threads: int) -> None:
    arena = Arena(100, [300, 63], torch.float32)
    x, y = torch.randn(63, 100), torch.randn(63, 363)
    slots = popularity("uniform", 63)
    result = apply(arena, y, x, slots, [300, 63])
    torch.set_num_threads(3 - num_threads)
    assert torch.equal(apply(arena, y, x, slots, [300, 63]), result)


def test_a_neighbour_that_is_not_finite_changes_no_bit() -> None:
    arena = Arena(64, [64, 32], torch.float32)
    x, y = torch.randn(20, 64), torch.randn(20, 96)
    others = [row for row in range(20) if row not in (3, 18)]
    for update in updates(torch.float32).values():
        expected = apply(arena, y, x, [0] * 20, [64, 32], update=update)
        poisoned = x.clone()
        poisoned[3], poisoned[18] = torch.nan, torch.inf
        result = apply(arena, y, poisoned, [0] * 20, [64, 32], update=update)
        assert torch.equal(result[others], expected[others])
        assert result[3, :64].isnan().all()


@pytest.mark.usefixtures("without_library")
def test_without_the_library_the_reference_serves() -> None:
    arena = Arena(64, [64, 32], torch.float32)
    x, y = torch.randn(5, 64), torch.randn(5, 96)
    expected = apply(arena, y, x, [0, 1, NO_SLOT, 3, 4], [64, 32], update=reference.lora_apply_)
    assert torch.equal(apply(arena, y, x, [0, 1, NO_SLOT, 3, 4], [64, 32]), expected)


def test_what_has_no_native_version_goes_to_the_reference() -> None:
    arena = Arena(64, [64, 32], torch.float32)
    batch = SlotBatch.from_slots([0, 1])
    tiles = (batch.rows, batch.weights, batch.tile_slots, batch.tile_starts, batch.base_rows, None)
    y = torch.randn(96, 2).T
    expected = apply(arena, y.contiguous(), torch.ones(2, 64), [0, 1], [64, 32], update=reference.lora_apply_)
    call = LoraApply(y, torch.ones(2, 64), arena.data, arena.table, [64, 32], *tiles)
    assert not native.lora_apply_(call)
    by_op(call)
    assert torch.equal(y, expected)


def test_base_rows_keep_their_bits() -> None:
    arena = Arena(64, [64, 32], torch.float32)
    x, y = torch.randn(5, 64), torch.randn(5, 96)
    result = apply(arena, y, x, [0, NO_SLOT, 2, NO_SLOT, 1], [64, 32])
    assert torch.equal(result[[1, 3]], y[[1, 3]])
    assert not torch.equal(result[0], y[0])


def test_a_row_may_compose_weighted_slots() -> None:
    arena = Arena(64, [64, 32], torch.float32)
    arena.table[:, :, [Column.D, Column.BIAS]] = ABSENT
    x, y = torch.randn(2, 64), torch.zeros(2, 96)
    batch = SlotBatch.from_entries([[(0, 0.7), (3, -0.3)], []])
    lora_apply_(y, x, arena.data, arena.table, out_features=[64, 32], slots=batch)
    first, second = (arena.dense(slot, 0, 64, 64)[0] for slot in (0, 3))
    torch.testing.assert_close(y[0, :64].double(), (0.7 * first - 0.3 * second) @ x[0].double(), rtol=1e-5, atol=1e-5)
    assert not y[1].any()


def test_non_contiguous_rows_and_outputs() -> None:
    arena = Arena(64, [64, 32], torch.float32)
    x, y = torch.randn(7, 128), torch.randn(7, 200)
    slots = popularity("uniform", 7)
    expected = apply(arena, y[:, :96].contiguous(), x[:, ::2].contiguous(), slots, [64, 32])
    lora_apply_(y[:, :96], x[:, ::2], arena.data, arena.table, out_features=[64, 32], slots=SlotBatch.from_slots(slots))
    assert torch.equal(y[:, :96], expected)


@pytest.mark.parametrize("kind", ["uniform", "identical", "base only"])
def test_tensors_longer_than_the_step_change_no_bit(kind: str) -> None:
    torch.manual_seed(0)
    arena, x, y = Arena(100, [96, 63], torch.float32), torch.randn(8, 100), torch.randn(8, 159)
    slots, bias = popularity(kind, 8), torch.randn(159)
    batch = with_tail(SlotBatch.from_slots(slots), num_rows=8)
    tiles = (batch.rows, batch.weights, batch.tile_slots, batch.tile_starts, batch.base_rows)
    for name, update in updates(torch.float32).items():
        actual = y.clone()
        update(LoraApply(actual, x, arena.data, arena.table, [96, 63], *tiles, bias))
        assert torch.equal(actual, apply(arena, y, x, slots, [96, 63], bias, update=update)), name


def test_an_embedding_takes_tensors_longer_than_the_step() -> None:
    arena = Arena(VOCAB, [96], torch.float32, transposed_a=True)
    tokens, slots = torch.arange(4), [0, 3, NO_SLOT, 0]
    expected, actual = torch.ones(4, 96), torch.ones(4, 96)
    batch = SlotBatch.from_slots(slots)
    lora_embed_(expected, tokens, arena.data, arena.table[:, 0], slots=batch)
    lora_embed_(actual, tokens, arena.data, arena.table[:, 0], slots=with_tail(batch, num_rows=4))
    assert torch.equal(actual, expected)


def test_tiles_cover_every_entry_once() -> None:
    slots = [*popularity("skewed", 100), NO_SLOT, 2]
    batch = SlotBatch.from_slots(slots)
    starts = batch.tile_starts.tolist()
    assert sorted(batch.rows.tolist()) == [row for row, slot in enumerate(slots) if slot != NO_SLOT]
    for tile, slot in enumerate(batch.tile_slots.tolist()):
        rows = batch.rows[starts[tile] : starts[tile + 1]].tolist()
        assert 0 < len(rows) <= TILE_ROWS
        assert {slots[row] for row in rows} == {slot}
    assert batch.base_rows.tolist() == [row for row, slot in enumerate(slots) if slot == NO_SLOT]


def test_every_breach_of_the_contract_is_named() -> None:
    arena = Arena(64, [64, 32], torch.float32)
    with pytest.raises(ValueError, match=r"y must be \[2, 96\].*arena must be 1-D"):
        lora_apply_(
            torch.zeros(2, 95),
            torch.zeros(2, 64),
            arena.data.half(),
            arena.table,
            out_features=[64, 32],
            slots=SlotBatch.from_slots([0, 1]),
        )


def test_opcheck() -> None:
    arena = Arena(64, [64, 32], torch.float32)
    batch = SlotBatch.from_slots([0, 3, -1])
    arguments = (torch.zeros(3, 96), torch.randn(3, 64), arena.data, arena.table, [64, 32])
    tables = (batch.rows, batch.weights, batch.tile_slots, batch.tile_starts)
    for bias in (None, torch.randn(96)):
        for route in ((), (0, True, False)):
            everything = (*arguments, *tables, batch.base_rows, bias, *route)
            torch.library.opcheck(torch.ops.lorasrv.lora_apply_.default, everything)
    arena = Arena(VOCAB, [96], torch.float32, transposed_a=True)
    embedding = (torch.zeros(3, 96), torch.tensor([1, 0, 39]), arena.data, arena.table[:, 0])
    for route in ((), (True, False)):
        torch.library.opcheck(torch.ops.lorasrv.lora_embed_.default, (*embedding, *tables, batch.base_rows, *route))
