"""The Triton LoRA kernels against the reference: on a CUDA device, or without one through the interpreter."""

from dataclasses import replace

import pytest
import torch
from interpreter import INTERPRETING, run_interpreted
from lora_arena import Arena, popularity, with_tail
from lorasrv_kernels.batch import NO_SLOT, SlotBatch
from lorasrv_kernels.lora import reference
from lorasrv_kernels.lora.reference import LoraApply, LoraEmbed
from lorasrv_kernels.table import ABSENT, Column
from torch import Tensor

pytest.importorskip("triton")
from lorasrv_kernels.lora import triton_kernels

VOCAB = 40
MAX_RANK = 128
# several planes, blocks of ranks and blocks of columns at sizes that the interpreter gets through
SMALL = replace(triton_kernels.TILING, block_i=64, min_plane=64, block_r=32, block_o=64, row_block_i=32)
TOLERANCE = {
    # two orders of addition over at most 128 features and 128 ranks
    torch.float32: {"rtol": 1e-5, "atol": 3e-5},
    # the interpreter cuts bits off where devices round: one unit in the last place
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-4},
    torch.float16: {"rtol": 2**-10, "atol": 1e-4},
}


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """Scratch that is read before it is written shows."""


def slot_tensors(batch: SlotBatch, device: torch.device) -> list[Tensor]:
    tensors = (batch.rows, batch.weights, batch.tile_slots, batch.tile_starts, batch.base_rows)
    return [tensor.to(device) for tensor in tensors]


def apply(
    device: torch.device,
    arena: Arena,
    y: Tensor,
    x: Tensor,
    batch: SlotBatch,
    out_features: list[int],
    bias: Tensor | None = None,
    *,
    max_rank: int = MAX_RANK,
    tiling: triton_kernels.Tiling = SMALL,
) -> Tensor:
    result = y.to(device, copy=True)
    call = LoraApply(
        result,
        x.to(device),
        arena.data.to(device),
        arena.table.to(device),
        out_features,
        *slot_tensors(batch, device),
        None if bias is None else bias.to(device),
        max_rank,
        batch.composed,
        batch.exact,
    )
    triton_kernels.lora_apply_(call, tiling=tiling)
    return result.cpu()


def expect(
    arena: Arena, y: Tensor, x: Tensor, batch: SlotBatch, out_features: list[int], bias: Tensor | None = None
) -> Tensor:
    result = y.clone()
    cpu = torch.device("cpu")
    tensors = slot_tensors(batch, cpu)
    reference.lora_apply_(LoraApply(result, x, arena.data, arena.table, out_features, *tensors, bias))
    return result


def check(
    device: torch.device,
    slots: list[int],
    in_features: int,
    out_features: list[int],
    dtype: torch.dtype,
    *,
    bias: bool,
    exact: bool = True,
) -> None:
    torch.manual_seed(0)
    arena = Arena(in_features, out_features, dtype)
    x, y = torch.randn(len(slots), in_features).to(dtype), torch.randn(len(slots), sum(out_features)).to(dtype)
    own = torch.randn(sum(out_features)).to(dtype) if bias else None
    batch = SlotBatch.from_slots(slots, exact=exact)
    result = apply(device, arena, y, x, batch, out_features, own)
    torch.testing.assert_close(result, expect(arena, y, x, batch, out_features, own), **TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["distinct", "uniform", "zipf", "identical", "skewed", "base only"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "inexact"])
def test_any_popularity(kind: str, bias: bool, exact: bool, triton_device: torch.device) -> None:
    check(triton_device, popularity(kind, 20), 100, [96, 63], torch.float32, bias=bias, exact=exact)


@pytest.mark.gpu
@pytest.mark.parametrize("in_features", [1, 63, 100, 128])
@pytest.mark.parametrize("out_features", [[1], [63], [100], [128], [1, 128], [100, 63]])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "inexact"])
def test_any_size(in_features: int, out_features: list[int], exact: bool, triton_device: torch.device) -> None:
    check(triton_device, [0, 4, 1, NO_SLOT, 0], in_features, out_features, torch.float32, bias=True, exact=exact)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "inexact"])
def test_any_dtype(dtype: torch.dtype, exact: bool, triton_device: torch.device) -> None:
    slots = [*popularity("uniform", 16), 4] if exact else [0, 1, 2, 3, 4, 4, NO_SLOT]
    check(triton_device, slots, 128, [100, 63], dtype, bias=True, exact=exact)


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [[], [NO_SLOT], [2]], ids=["empty", "base", "one"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_smallest_batches(slots: list[int], bias: bool, triton_device: torch.device) -> None:
    check(triton_device, slots, 63, [63, 1], torch.float32, bias=bias)


@pytest.mark.gpu
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "inexact"])
@pytest.mark.parametrize("kind", ["uniform", "identical", "base only", "distinct"])
def test_tensors_longer_than_the_step_change_no_bit(kind: str, exact: bool, triton_device: torch.device) -> None:
    torch.manual_seed(0)
    arena, x, y = Arena(100, [96, 63], torch.float32), torch.randn(8, 100), torch.randn(8, 159)
    batch, bias = SlotBatch.from_slots(popularity(kind, 8), exact=exact), torch.randn(159)
    for own in (None, bias):
        expected = apply(triton_device, arena, y, x, batch, [96, 63], own)
        actual = apply(triton_device, arena, y, x, with_tail(batch, num_rows=8), [96, 63], own)
        assert torch.equal(actual, expected)


@pytest.mark.gpu
def test_a_row_alone_takes_its_own_programs(triton_device: torch.device) -> None:
    torch.manual_seed(0)
    arena, x, y = Arena(100, [96, 63], torch.float32), torch.randn(4, 100), torch.randn(4, 159)
    alone, shared = ([0, 2, 3, 4], [2, 2, 3, 3])
    for slots, same in ((alone, False), (shared, True)):
        exact = apply(triton_device, arena, y, x, SlotBatch.from_slots(slots), [96, 63])
        other = apply(triton_device, arena, y, x, SlotBatch.from_slots(slots, exact=False), [96, 63])
        # sums over 100 features in another order
        torch.testing.assert_close(other, exact, **TOLERANCE[torch.float32])
        assert torch.equal(other, exact) == same


@pytest.mark.gpu
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "inexact"])
def test_the_tiling_that_serves(exact: bool, triton_device: torch.device) -> None:
    torch.manual_seed(0)
    arena, x, y = Arena(1100, [96, 63], torch.float32), torch.randn(6, 1100), torch.randn(6, 159)
    batch = SlotBatch.from_slots([0, 1, 2, 3, 4, 0], exact=exact)
    result = apply(triton_device, arena, y, x, batch, [96, 63], tiling=triton_kernels.TILING)
    # as above, over 1100 features of a 33rd of the size
    torch.testing.assert_close(result, expect(arena, y, x, batch, [96, 63]), **TOLERANCE[torch.float32])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_neighbours_change_no_bit(dtype: torch.dtype, triton_device: torch.device) -> None:
    torch.manual_seed(0)
    arena, x, y = Arena(100, [96, 63], dtype), torch.randn(20, 100).to(dtype), torch.randn(20, 159).to(dtype)
    slots, bias = popularity("uniform", 20), torch.randn(159).to(dtype)
    mixed = apply(triton_device, arena, y, x, SlotBatch.from_slots(slots), [96, 63], bias)
    for row in range(0, 20, 3):
        one = slice(row, row + 1)
        alone = apply(triton_device, arena, y[one], x[one], SlotBatch.from_slots(slots[one]), [96, 63], bias)
        assert torch.equal(alone, mixed[one])


@pytest.mark.gpu
def test_no_bound_on_ranks_changes_a_bit(triton_device: torch.device) -> None:
    torch.manual_seed(0)
    arena, x, y = Arena(100, [96, 63], torch.float32), torch.randn(5, 100), torch.randn(5, 159)
    batch = SlotBatch.from_slots([0, 1, 2, 3, 4])
    results = [apply(triton_device, arena, y, x, batch, [96, 63], max_rank=bound) for bound in (128, 1000, 0)]
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "inexact"])
def test_ranks_beyond_the_bound_are_not_a_number(exact: bool, triton_device: torch.device) -> None:
    torch.manual_seed(0)
    arena, x, y = Arena(100, [96, 63], torch.float32), torch.randn(3, 100), torch.randn(3, 159)
    batch = SlotBatch.from_slots([0, 2, 4], exact=exact)
    expected = expect(arena, y, x, batch, [96, 63])
    expected[1:, :96] = torch.nan
    result = apply(triton_device, arena, y, x, batch, [96, 63], max_rank=16)
    torch.testing.assert_close(result, expected, **TOLERANCE[torch.float32], equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "inexact"])
def test_rows_of_several_slots(exact: bool, triton_device: torch.device) -> None:
    torch.manual_seed(0)
    arena, x, y = Arena(100, [96, 63], torch.float32), torch.randn(20, 100), torch.randn(20, 159)
    arena.table[:, :, [Column.D, Column.BIAS]] = ABSENT
    entries = [[(row % 3, 0.7), (3, -0.3), *[(4, 1.0)] * (row == 6)] if row % 5 else [] for row in range(20)]
    batch = SlotBatch.from_entries(entries, exact=exact)
    result = apply(triton_device, arena, y, x, batch, [96, 63])
    torch.testing.assert_close(result, expect(arena, y, x, batch, [96, 63]), **TOLERANCE[torch.float32])


@pytest.mark.gpu
def test_views(triton_device: torch.device) -> None:
    torch.manual_seed(0)
    arena, batch = Arena(64, [64, 32], torch.float32), SlotBatch.from_slots(popularity("uniform", 7))
    wide_x, wide_y = torch.randn(7, 128, device=triton_device), torch.randn(7, 200, device=triton_device)
    x, y, rest = wide_x[:, ::2], wide_y[:, 5:197:2], wide_y[:, 4::2].clone()
    expected = apply(triton_device, arena, y.contiguous(), x.contiguous(), batch, [64, 32])
    table = torch.full((5, 9, 8), 7, device=triton_device)
    table[:, 4:6] = arena.table.to(triton_device)
    tensors, data = slot_tensors(batch, triton_device), arena.data.to(triton_device)
    call = LoraApply(y, x, data, table[:, 4:6], [64, 32], *tensors, None, MAX_RANK)
    triton_kernels.lora_apply_(call, tiling=SMALL)
    assert torch.equal(y.cpu(), expected)
    assert torch.equal(wide_y[:, 4::2], rest)


@pytest.mark.gpu
def test_a_scale_without_ranks(triton_device: torch.device) -> None:
    torch.manual_seed(0)
    arena, x, y = Arena(64, [64, 32], torch.float32), torch.randn(2, 64), torch.randn(2, 96)
    arena.table[0, 0, Column.RANK] = 0
    arena.table[0, 0, Column.BIAS] = ABSENT
    batch = SlotBatch.from_slots([0, 1])
    result = apply(triton_device, arena, y, x, batch, [64, 32])
    assert not torch.equal(result[0, :64], y[0, :64])
    torch.testing.assert_close(result, expect(arena, y, x, batch, [64, 32]), **TOLERANCE[torch.float32])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("composed", [False, True], ids=["one-slot", "several-slots"])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "inexact"])
def test_embedding(dtype: torch.dtype, composed: bool, exact: bool, triton_device: torch.device) -> None:
    torch.manual_seed(0)
    arena = Arena(VOCAB, [100], dtype, transposed_a=True)
    slots = [0, 1, 2, 3, 4, NO_SLOT] if not exact else popularity("uniform", 20)
    batch = SlotBatch.from_slots(slots, exact=exact)
    if composed:
        arena.table[:, :, Column.D] = ABSENT
        entries = [[(slot, 0.5), (2, 1.0)] if slot not in (NO_SLOT, 2) else [] for slot in slots]
        batch = SlotBatch.from_entries(entries, exact=exact)
    arena.table[:, :, Column.BIAS] = ABSENT
    ids, y = torch.arange(len(slots)) * 7 % VOCAB, torch.randn(len(slots), 100).to(dtype)
    expected, result = y.clone(), y.to(triton_device, copy=True)
    numbers = (ids, arena.data, arena.table[:, 0], *slot_tensors(batch, torch.device("cpu")))
    reference.lora_embed_(LoraEmbed(expected, *numbers))
    there = (tensor.to(triton_device) for tensor in numbers)
    triton_kernels.lora_embed_(LoraEmbed(result, *there, batch.composed, batch.exact), tiling=SMALL)
    tolerance = dict(TOLERANCE[dtype])
    if composed and dtype is torch.bfloat16:
        # a row is rounded once per slot, each time to the size of a partial sum
        tolerance = {"rtol": 2**-6, "atol": 2**-5}
    torch.testing.assert_close(result.cpu(), expected, **tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_ops_wait_for_nothing() -> None:
    device = torch.device("cuda")
    arena, batch = Arena(64, [64, 32], torch.bfloat16), SlotBatch.from_slots([0, -1, 4], device=device)
    y, x = torch.zeros(3, 96, device=device).bfloat16(), torch.randn(3, 64, device=device).bfloat16()
    data, table, tables = arena.data.to(device), arena.table.to(device), slot_tensors(batch, device)
    expected = apply(device, arena, y, x, batch, [64, 32], tiling=triton_kernels.TILING)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.lorasrv.lora_apply_(y, x, data, table, [64, 32], *tables, None, MAX_RANK)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(y.cpu(), expected)


@pytest.mark.parametrize("name", ["lora_apply_", "lora_embed_"])
def test_registered_for_cuda(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lorasrv::{name}", "CUDA")


@pytest.mark.skipif(INTERPRETING, reason="this is the interpreter")
def test_through_the_interpreter() -> None:
    run_interpreted(__file__, native_only=(test_the_ops_wait_for_nothing.__name__,))
