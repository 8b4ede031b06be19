"""Paged attention in Triton against the reference: interpreted, natively on CUDA, and compiled for CUDA devices."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import INTERPRETING, run_interpreted
from lorasrv_kernels import operators, triton_modules
from lorasrv_kernels.attention import BLOCK_TOKENS, SPLIT_BLOCKS, AttentionBatch, Span, reference, tile_tokens
from lorasrv_kernels.attention.reference import PagedAttention, StoreKv
from torch import Tensor

pytest.importorskip("triton")
import aot

native = pytest.mark.skipif(INTERPRETING, reason="this is the interpreter")
# float32 sums in another order over values of about 1, then one rounding; weights of a softmax are rounded as well
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

SPANS = [(0, 1), (31, 1), (32, 1), (70, 1), (0, 18), (20, 14), (64, 3)]


def kernels() -> Any:
    return triton_modules.load("lorasrv_kernels.attention.triton_kernels")


class Step:
    """Spans of sequences of random keys and values at shuffled blocks of a cache that is NaN elsewhere."""

    def __init__(
        self,
        spans: Sequence[tuple[int, int]],
        *,
        heads: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        head_size: int = 48,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        num_heads, num_kv_heads = heads
        widths = [-(-(start + count) // BLOCK_TOKENS) for start, count in spans]
        tables = torch.randperm(sum(widths) + 3, generator=generator)[: sum(widths)].split(widths)
        cache = torch.full((sum(widths) + 3, 2, num_kv_heads, BLOCK_TOKENS, head_size), torch.nan)
        for (start, count), table in zip(spans, tables, strict=True):
            for position in range(start + count):
                place = table[position // BLOCK_TOKENS], slice(None), slice(None), position % BLOCK_TOKENS
                cache[place] = torch.randn(2, num_kv_heads, head_size, generator=generator)
        self.batch = AttentionBatch.from_spans(
            [
                Span(start=start, num_tokens=count, block_table=table.tolist())
                for (start, count), table in zip(spans, tables, strict=True)
            ],
            tile_tokens=tile_tokens(num_heads, num_kv_heads),
            device=device,
        )
        num_tokens = sum(count for _, count in spans)
        self.q = torch.randn(num_tokens, num_heads, head_size, generator=generator).to(device, dtype)
        self.cache = cache.to(device, dtype)

    def call(self, window: int, split_blocks: int = SPLIT_BLOCKS) -> PagedAttention:
        batch = self.batch
        scale = self.q.shape[-1] ** -0.5
        tables = (batch.block_tables, batch.tiles, batch.tile_tokens)
        return PagedAttention(self.q, self.cache, *tables, scale, window, split_blocks)

    def check(self, window: int, *, split_blocks: int = SPLIT_BLOCKS) -> Tensor:
        actual: Tensor = kernels().paged_attention(self.call(window, split_blocks))
        expected = reference.paged_attention(self.call(window))
        tolerance = TOLERANCES[actual.dtype]
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        return actual


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (6, 1), (32, 1)], ids=str)
@pytest.mark.parametrize("window", [0, 7, 40])
def test_decode_and_chunked_prefill_together(triton_device: torch.device, heads: tuple[int, int], window: int) -> None:
    Step(SPANS, heads=heads, dtype=torch.float32, device=triton_device).check(window)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("dtype", "window", "split_blocks"), [(torch.float32, 0, 1), (torch.float32, 40, 1), (torch.bfloat16, 0, 2)]
)
def test_splits_walked_side_by_side_or_in_turn_have_the_same_bits(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, window: int, split_blocks: int
) -> None:
    step = Step(SPANS[2:], heads=(6, 2), dtype=dtype, device=triton_device)
    side_by_side = step.check(window, split_blocks=split_blocks)
    monkeypatch.setattr(kernels(), "ENOUGH_PROGRAMS", 0)
    in_turn = step.check(window, split_blocks=split_blocks)
    assert torch.equal(in_turn, side_by_side)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
def test_a_table_wider_than_its_sequences_changes_no_bit(triton_device: torch.device) -> None:
    step = Step(SPANS[2:5], heads=(4, 2), dtype=torch.float32, device=triton_device)
    expected = step.check(0, split_blocks=2)
    tables = step.batch.block_tables
    step.batch = replace(step.batch, block_tables=torch.cat([tables, tables.new_full((len(tables), 9), 1 << 30)], 1))
    actual = kernels().paged_attention(step.call(0, 2))
    assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("window", [0, 1])
def test_every_dtype(triton_device: torch.device, dtype: torch.dtype, window: int) -> None:
    Step(SPANS, heads=(4, 2), dtype=dtype, device=triton_device).check(window)


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [16, 64, 80])
def test_every_head_size(triton_device: torch.device, head_size: int) -> None:
    Step([(40, 5)], heads=(4, 2), dtype=torch.float32, device=triton_device, head_size=head_size).check(0)


@pytest.mark.gpu
def test_any_strides(triton_device: torch.device) -> None:
    step = Step([(40, 5), (3, 1)], heads=(4, 2), dtype=torch.float32, device=triton_device)
    expected = step.check(7)
    step.q = step.q.transpose(0, 2).contiguous().transpose(0, 2)
    step.cache = torch.stack([step.cache, step.cache], dim=1)[:, 1].transpose(3, 4).contiguous().transpose(3, 4)
    assert torch.equal(step.check(7), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_and_neighbours_change_no_bit(triton_device: torch.device, dtype: torch.dtype) -> None:
    together = Step([(16, 24), (50, 1)], heads=(4, 2), dtype=dtype, device=triton_device)
    for window in (0, 9):
        expected = together.check(window, split_blocks=1)
        # the same tokens alone in their step, from the middle of the prefill on; where a tile begins, because the
        # library that multiplies for the interpreter adds in an order that follows the row
        rows = together.q[8:24]
        batch = AttentionBatch.from_spans(
            [Span(start=24, num_tokens=16, block_table=together.batch.block_tables[0].tolist())],
            tile_tokens=together.batch.tile_tokens,
            device=triton_device,
        )
        tables = (batch.block_tables, batch.tiles, batch.tile_tokens)
        alone = kernels().paged_attention(PagedAttention(rows, together.cache, *tables, 48**-0.5, window, 1))
        assert torch.equal(alone, expected[8:24])


@pytest.mark.gpu
def test_a_tile_of_no_tokens_writes_nothing(triton_device: torch.device) -> None:
    step = Step([(40, 5)], heads=(4, 2), dtype=torch.float32, device=triton_device)
    expected = step.check(0, split_blocks=1)
    step.batch.tiles.resize_(len(step.batch.tiles) + 2, 4)[-2:] = 0
    assert torch.equal(kernels().paged_attention(step.call(0, 1)), expected)


@pytest.mark.gpu
def test_no_sequences(triton_device: torch.device) -> None:
    step = Step([], heads=(4, 2), dtype=torch.float32, device=triton_device)
    assert kernels().paged_attention(step.call(0, 2)).shape == (0, 4, 48)
    kernels().store_kv_(StoreKv(step.cache, step.q[:, :2], step.q[:, :2], step.batch.slot_mapping))


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [16, 48, 80])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_keys_and_values_are_stored(triton_device: torch.device, dtype: torch.dtype, head_size: int) -> None:
    # more elements than one program stores
    heads = 30
    wide = torch.randn(7, 3 * heads, head_size, device=triton_device).to(dtype)
    k, v = wide[:, heads : 2 * heads], wide[:, 2 * heads :].transpose(0, 1).contiguous().transpose(0, 1)
    slots = torch.tensor([0, 33, 31, -1, 95, 64, -1], device=triton_device)
    # two layers, of which one is written, with the lanes of a head apart
    cache = torch.full((3, 2, 2, heads, head_size, BLOCK_TOKENS), torch.nan, device=triton_device).to(dtype)
    expected, layer = cache.clone(), cache[:, 1].transpose(3, 4)
    reference.store_kv_(StoreKv(expected[:, 1].transpose(3, 4), k, v, slots))
    kernels().store_kv_(StoreKv(layer, k, v, slots))
    assert torch.equal(cache.isnan(), expected.isnan())
    assert torch.equal(cache.nan_to_num(), expected.nan_to_num())
    assert int(cache.isnan().logical_not().sum()) == 5 * 2 * heads * head_size


@pytest.mark.gpu
def test_the_op_is_registered_for_cuda(triton_device: torch.device) -> None:
    for name in ("paged_attention", "store_kv_"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lorasrv::{name}", "CUDA")
    step = Step([(40, 5)], heads=(4, 2), dtype=torch.float32, device=triton_device)
    assert torch.equal(operators.versions["paged_attention", "CUDA"](*step.call(0, 2)), step.check(0))
    store = operators.versions["store_kv_", "CUDA"]
    store(step.cache, step.q[:, :2], step.q[:, 2:], step.batch.slot_mapping)
    slot = int(step.batch.slot_mapping[0])
    assert torch.equal(step.cache[slot // BLOCK_TOKENS, 1, :, slot % BLOCK_TOKENS], step.q[0, 2:])


@native
def test_through_the_interpreter() -> None:
    run_interpreted(__file__)


@native
@pytest.mark.aot
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("head_size", "window"), [(64, 0), (128, 0), (128, 4096)], ids=["Llama 3.2 1B", "Llama 3 8B", "Mistral 7B"]
)
@pytest.mark.parametrize(
    ("num_tokens", "blocks", "grids"),
    [
        (8, 8, [(8, 8, 1)]),
        (8, 256, [(8, 8, 32), (8, 4 * 32)]),
        (64, 256, [(64, 8, 1)]),
    ],
    ids=["one split", "side by side", "in turn"],
)
def test_compiles(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capability: int,
    head_size: int,
    window: int,
    num_tokens: int,
    blocks: int,
    grids: list[tuple[int, ...]],
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with torch.device("meta"):
        q = torch.empty(num_tokens, 32, head_size, dtype=torch.bfloat16)
        cache = torch.empty(100, 2, 8, BLOCK_TOKENS, head_size, dtype=torch.bfloat16)
        tables, tiles = (torch.empty(num_tokens, width, dtype=torch.int32) for width in (blocks, 4))
    call = PagedAttention(q, cache, tables, tiles, tile_tokens(32, 8), head_size**-0.5, window, 8)
    launches = aot.record(monkeypatch, lambda: kernels().paged_attention(call))
    assert [launch.grid for launch in launches] == grids
    compiled = [aot.compile_launch(launch, capability) for launch in launches]
    for kernel in compiled:
        kernel.check(capability)
    assert "HMMA.16816.F32.BF16" in compiled[0].sass
    # keys and values come in whole 16 bytes
    assert "LDGSTS.E.BYPASS.128" in compiled[0].sass
    # a fused product here and not there would round differently
    assert not any(re.search(r"FFMA.* R\d+, R\d+, R\d+, R\d+", kernel.sass) for kernel in compiled[1:])


@native
@pytest.mark.aot
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_the_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: int) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with torch.device("meta"):
        heads = torch.empty(8, 48, 128, dtype=torch.bfloat16)
        cache = torch.empty(100, 32, 2, 8, BLOCK_TOKENS, 128, dtype=torch.bfloat16)[:, 3]
        slots = torch.empty(8, dtype=torch.int64)
    call = StoreKv(cache, heads[:, 32:40], heads[:, 40:], slots)
    (launch,) = aot.record(monkeypatch, lambda: kernels().store_kv_(call))
    kernel = aot.compile_launch(launch, capability)
    kernel.check(capability)
    assert "LDG.E.128" in kernel.sass
    assert "STG.E.128" in kernel.sass
