"""Paged attention: against torch's own, and bit-equal however a sequence is cut and whoever shares the step."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from lorasrv_kernels.attention import (
    BLOCK_TOKENS,
    AttentionBatch,
    Span,
    native,
    paged_attention,
    reference,
    split_blocks,
    store_kv_,
    tile_tokens,
)
from lorasrv_kernels.attention.reference import PagedAttention, StoreKv
from lorasrv_kernels.cpu.isa import Isa, widest_isa
from torch import Tensor

HEAD_SIZE = 48
WINDOWS = [0, 1, 7, 40, 64]

Attend = Callable[[Tensor, Tensor, AttentionBatch, float, int], Tensor]


def call_of(q: Tensor, cache: Tensor, batch: AttentionBatch, scale: float, window: int) -> PagedAttention:
    return PagedAttention(q, cache, batch.block_tables, batch.tiles, batch.tile_tokens, scale, window)


def by_reference(q: Tensor, cache: Tensor, batch: AttentionBatch, scale: float, window: int) -> Tensor:
    return reference.paged_attention(call_of(q, cache, batch, scale, window))


def natively(q: Tensor, cache: Tensor, batch: AttentionBatch, scale: float, window: int, *, isa: Isa) -> Tensor:
    out = native.paged_attention(call_of(q, cache, batch, scale, window), isa=isa)
    assert out is not None
    return out


def implementations() -> dict[str, Attend]:
    """What this machine can run, by name; without the native library the op is the reference."""
    found: dict[str, Attend] = {"reference": by_reference}
    widest = widest_isa()
    if widest is not None:
        # what is wider than AVX-512 runs as AVX-512
        found |= {isa.name: partial(natively, isa=isa) for isa in Isa if isa <= min(widest, Isa.AVX512)}
    return found


@pytest.fixture(params=implementations())
def attend(request: pytest.FixtureRequest) -> Attend:
    return implementations()[request.param]


class Sequences:
    """Random sequences in one poisoned cache, at shuffled blocks."""

    def __init__(
        self,
        lengths: list[int],
        *,
        num_heads: int,
        num_kv_heads: int,
        dtype: torch.dtype,
        window: int = 0,
        head_size: int = HEAD_SIZE,
        attend: Attend = lambda q, cache, batch, scale, window: paged_attention(
            q, cache, batch, scale=scale, window=window
        ),
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.num_heads, self.num_kv_heads, self.window = num_heads, num_kv_heads, window
        self.scale, self.attend = head_size**-0.5, attend
        widths = [-(-length // BLOCK_TOKENS) for length in lengths]
        blocks = torch.randperm(sum(widths) + 3, generator=generator)[: sum(widths)].split(widths)
        self.tables = [table.tolist() for table in blocks]
        self.cache = torch.full((sum(widths) + 3, 2, num_kv_heads, BLOCK_TOKENS, head_size), torch.nan, dtype=dtype)
        self.q, self.k, self.v = (
            [torch.randn(length, heads, head_size, generator=generator).to(dtype) for length in lengths]
            for heads in (num_heads, num_kv_heads, num_kv_heads)
        )

    def step(self, parts: list[tuple[int, int, int]]) -> list[Tensor]:
        """Computes tokens start..stop of each (sequence, start, stop) in one call."""
        batch = AttentionBatch.from_spans(
            [Span(start=a, num_tokens=b - a, block_table=self.tables[s]) for s, a, b in parts],
            tile_tokens=tile_tokens(self.num_heads, self.num_kv_heads),
        )
        q, k, v = (torch.cat([x[s][a:b] for s, a, b in parts]) for x in (self.q, self.k, self.v))
        store_kv_(self.cache, k, v, batch)
        out = self.attend(q, self.cache, batch, self.scale, self.window)
        return list(out.split([b - a for _, a, b in parts]))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("head_size", [48, 7, 64, 100])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1), (32, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equals_torch_attention(
    num_heads: int, num_kv_heads: int, dtype: torch.dtype, head_size: int, attend: Attend
) -> None:
    lengths = [1, 31, 32, 33, 97]
    kind = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_size": head_size}
    sequences = Sequences(lengths, dtype=dtype, attend=attend, **kind)
    for index, out in enumerate(sequences.step([(i, 0, n) for i, n in enumerate(lengths)])):
        q, k, v = (x[index].double().transpose(0, 1)[None] for x in (sequences.q, sequences.k, sequences.v))
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        tolerance = 1e-5 if dtype == torch.float32 else 8e-3  # fp32 sums, then one rounding to the dtype
        torch.testing.assert_close(out.double(), expected[0].transpose(0, 1), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("window", WINDOWS)
def test_chunks_and_neighbours_change_no_bit(
    num_heads: int, num_kv_heads: int, dtype: torch.dtype, window: int, attend: Attend
) -> None:
    lengths = [70, 129, 5, 40]
    kind = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "window": window}
    whole = Sequences(lengths, dtype=dtype, attend=attend, **kind)
    expected = [whole.step([(i, 0, n)])[0] for i, n in enumerate(lengths)]
    cut = Sequences(lengths, dtype=dtype, attend=attend, **kind)
    done = [0, 0, 0, 0]
    generator = torch.Generator().manual_seed(3)
    while any(done[i] < n for i, n in enumerate(lengths)):
        parts = []
        for i in torch.randperm(4, generator=generator).tolist():
            take = int(torch.randint(0, 34, (1,), generator=generator))
            if take and done[i] < lengths[i]:
                parts.append((i, done[i], min(done[i] + take, lengths[i])))
        for (i, start, stop), out in zip(parts, cut.step(parts) if parts else [], strict=True):
            assert torch.equal(out, expected[i][start:stop])
            done[i] = stop


@pytest.mark.parametrize("window", WINDOWS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_window_hides_what_lies_before_it(window: int, dtype: torch.dtype, attend: Attend) -> None:
    lengths = [1, 33, 140]
    sequences = Sequences(lengths, num_heads=4, num_kv_heads=2, dtype=dtype, window=window, attend=attend)
    outs = sequences.step([(i, 0, n) for i, n in enumerate(lengths)])
    for index, (length, out) in enumerate(zip(lengths, outs, strict=True)):
        q, k, v = (x[index].double().transpose(0, 1)[None] for x in (sequences.q, sequences.k, sequences.v))
        distance = torch.arange(length)[:, None] - torch.arange(length)
        mask = (distance >= 0) & (distance < window)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        tolerance = 1e-5 if dtype == torch.float32 else 8e-3  # fp32 sums, then one rounding to the dtype
        torch.testing.assert_close(out.double(), expected[0].transpose(0, 1), rtol=tolerance, atol=tolerance)


def test_a_window_of_the_whole_sequence_changes_no_bit(attend: Attend) -> None:
    kind = {"num_heads": 4, "num_kv_heads": 2}
    outs = [
        Sequences([129], dtype=torch.float32, window=window, attend=attend, **kind).step([(0, 0, 129)])[0]
        for window in (0, 129, 1000)
    ]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_wide_instruction_sets_give_the_same_bits(dtype: torch.dtype, window: int) -> None:
    found = implementations()
    if Isa.AVX512.name not in found:
        pytest.skip("no AVX-512, or native library not built")
    outs = [
        Sequences([129], num_heads=6, num_kv_heads=2, dtype=dtype, window=window, attend=found[isa.name])
        for isa in (Isa.AVX2, Isa.AVX512)
    ]
    assert torch.equal(*(sequences.step([(0, 0, 129)])[0] for sequences in outs))


@pytest.mark.parametrize("name", [name for name in implementations() if name != "reference"])
def test_what_a_token_does_not_see_is_not_in_its_sums(name: str) -> None:
    """Later tokens of the same tile may hold anything; so may those before the window."""
    sequences = Sequences(
        [40], num_heads=4, num_kv_heads=4, dtype=torch.float32, window=9, attend=implementations()[name]
    )
    expected = sequences.step([(0, 0, 40)])[0]
    for part in (sequences.q, sequences.k, sequences.v):
        part[0][[0, 35]] = torch.nan
    unharmed = [*range(9, 35)]
    assert torch.equal(sequences.step([(0, 0, 40)])[0][unharmed], expected[unharmed])


def test_tiles_of_no_tokens_are_passed_over(attend: Attend) -> None:
    """A captured graph may have more tiles than its step."""
    batch = AttentionBatch.from_spans([Span(start=0, num_tokens=3, block_table=[1])], tile_tokens=8)
    longer = replace(batch, tiles=torch.cat([batch.tiles, torch.zeros(2, 4, dtype=torch.int32)]))
    q, k, v = torch.randn(3, 3, 2, 16)
    cache = torch.full((2, 2, 2, BLOCK_TOKENS, 16), torch.nan)
    store_kv_(cache, k, v, batch)
    assert torch.equal(attend(q, cache, longer, 0.25, 0), attend(q, cache, batch, 0.25, 0))


def test_threads_change_no_bit(num_threads: int) -> None:
    kind = {"num_heads": 4, "num_kv_heads": 2, "dtype": torch.float32}
    parts = [(0, 0, 200), (1, 0, 70)]
    outs = Sequences([200, 70], **kind).step(parts)
    torch.set_num_threads(3 - num_threads)
    for out, again in zip(outs, Sequences([200, 70], **kind).step(parts), strict=True):
        assert torch.equal(out, again)


def test_scores_of_every_size() -> None:
    """Weights from 1 down to what float32 cannot hold, and equal ones."""
    q = torch.ones(1, 1, 16)
    batch = AttentionBatch.from_spans([Span(start=63, num_tokens=1, block_table=[1, 0])], tile_tokens=16)
    cache = torch.randn(2, 2, 1, BLOCK_TOKENS, 16, generator=torch.Generator().manual_seed(4))
    for step in (0.0, 1e-3, 0.3, 1.5, 40.0):
        scores = torch.arange(64)[torch.randperm(64, generator=torch.Generator().manual_seed(5))] * step
        cache[:, 0, 0] = scores.view(2, BLOCK_TOKENS, 1).flip(0) / 16
        expected = scores.double().softmax(0) @ cache[[1, 0], 1, 0].flatten(0, 1).double()
        for name, attend in implementations().items():
            out = attend(q, cache, batch, 1.0, 0)[0, 0].double()
            # sums of 64 products, and weights within 3e-7 of exp
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_what_lies_apart_in_memory_is_read_and_stored(dtype: torch.dtype) -> None:
    """Views of the fused projections, of one layer of a cache, and of heads that are not contiguous."""
    fused = torch.randn(3, 8, 16).to(dtype)
    q, k, v = fused.split([4, 2, 2], dim=1)
    batch = AttentionBatch.from_spans([Span(start=0, num_tokens=3, block_table=[1])], tile_tokens=8)
    layers = torch.full((2, 3, 2, 2, BLOCK_TOKENS, 16), torch.nan).to(dtype)
    expected = torch.full((2, 2, 2, BLOCK_TOKENS, 16), torch.nan).to(dtype)
    reference.store_kv_(StoreKv(expected, k, v, batch.slot_mapping))
    store_kv_(layers[:, 1], k, v, batch)
    assert torch.equal(layers[:, 1].nan_to_num(7.0), expected.nan_to_num(7.0))
    assert layers[:, [0, 2]].isnan().all()
    wanted = paged_attention(q.contiguous(), expected, batch, scale=0.25)
    strided = torch.randn(3, 4, 32).to(dtype)
    strided[:, :, ::2] = q
    for query in (q, strided[:, :, ::2]):
        out = paged_attention(query, layers[:, 1], batch, scale=0.25)
        assert torch.equal(out, wanted)


@pytest.mark.usefixtures("without_library")
def test_without_the_library_the_reference_serves() -> None:
    kind = {"num_heads": 4, "num_kv_heads": 2, "dtype": torch.float32}
    served = Sequences([70], **kind).step([(0, 0, 70)])[0]
    assert torch.equal(served, Sequences([70], attend=by_reference, **kind).step([(0, 0, 70)])[0])


def test_no_sequences() -> None:
    batch = AttentionBatch.from_spans([], tile_tokens=8)
    cache = torch.zeros(1, 2, 2, BLOCK_TOKENS, 16)
    for window in (0, 5):
        assert paged_attention(torch.zeros(0, 4, 16), cache, batch, scale=1.0, window=window).shape == (0, 4, 16)


def test_a_short_block_table_is_refused() -> None:
    with pytest.raises(ValueError, match="ends at 33 but has 1 blocks"):
        AttentionBatch.from_spans([Span(start=32, num_tokens=1, block_table=[0])], tile_tokens=8)


def test_every_breach_of_the_contract_is_named() -> None:
    batch = AttentionBatch.from_spans([Span(start=0, num_tokens=2, block_table=[0])], tile_tokens=8)
    cache = torch.zeros(1, 2, 2, BLOCK_TOKENS, 16)
    with pytest.raises(ValueError, match=r"3 heads of size 16 do not fit.*cache must be torch.float16"):
        paged_attention(torch.zeros(2, 3, 16).half(), cache, batch, scale=1.0)
    arguments = (torch.zeros(2, 2, 16), cache.float(), batch.block_tables, batch.tiles, 8, 1.0, 0, 0)
    with pytest.raises(ValueError, match="split_blocks must be at least 1, got 0"):
        torch.ops.lorasrv.paged_attention(*arguments)
    with pytest.raises(ValueError, match="window must be at least 0, got -1"):
        paged_attention(torch.zeros(2, 4, 16), cache, batch, scale=1.0, window=-1)
    with pytest.raises(ValueError, match="k and v must be one shape"):
        store_kv_(cache, torch.zeros(2, 2, 16), torch.zeros(2, 1, 16), batch)


@pytest.mark.parametrize("store", [reference.store_kv_, native.store_kv_], ids=["reference", "native"])
def test_a_token_without_a_place_is_not_stored(store: Callable[..., object]) -> None:
    cache = torch.zeros(2, 2, 1, BLOCK_TOKENS, 16)
    kept = store(StoreKv(cache, torch.ones(3, 1, 16), torch.ones(3, 1, 16), torch.tensor([3, -1, 40])))
    if kept is False:
        pytest.skip("the native library is not built")
    assert cache.sum() == 2 * 2 * 16
    assert cache[0, :, 0, 3].all()
    assert cache[1, :, 0, 8].all()


def test_splits_are_few_and_follow_the_longest_sequence() -> None:
    lengths = (1, 2048, 16384, 16385, 131072)
    assert [split_blocks(length) for length in lengths] == [8, 8, 8, 9, 64]


def test_opcheck() -> None:
    batch = AttentionBatch.from_spans([Span(start=0, num_tokens=2, block_table=[0])], tile_tokens=8)
    cache = torch.zeros(1, 2, 2, BLOCK_TOKENS, 16)
    ops = torch.ops.lorasrv
    torch.library.opcheck(ops.store_kv_.default, (cache, *torch.randn(2, 2, 2, 16), batch.slot_mapping))
    for window in (0, 1):
        arguments = (torch.randn(2, 4, 16), cache, batch.block_tables, batch.tiles, 8, 0.25, window)
        torch.library.opcheck(ops.paged_attention.default, arguments)
        torch.library.opcheck(ops.paged_attention.default, (*arguments, 3))
