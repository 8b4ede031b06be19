"""Paged attention: against torch's own, and bit-equal however a sequence is cut and whoever shares the step."""

import pytest
import torch
from lorasrv_kernels.attention import BLOCK_TOKENS, AttentionBatch, Span, paged_attention, store_kv_, tile_tokens
from torch import Tensor

HEAD_SIZE = 48
WINDOWS = [0, 1, 7, 40, 64]


class Sequences:
    """Random sequences in one poisoned cache, at shuffled blocks."""

    def __init__(
        self, lengths: list[int], *, num_heads: int, num_kv_heads: int, dtype: torch.dtype, window: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.num_heads, self.num_kv_heads, self.window = num_heads, num_kv_heads, window
        widths = [-(-length // BLOCK_TOKENS) for length in lengths]
        blocks = torch.randperm(sum(widths) + 3, generator=generator)[: sum(widths)].split(widths)
        self.tables = [table.tolist() for table in blocks]
        self.cache = torch.full((sum(widths) + 3, 2, num_kv_heads, BLOCK_TOKENS, HEAD_SIZE), torch.nan, dtype=dtype)
        self.q, self.k, self.v = (
            [torch.randn(length, heads, HEAD_SIZE, generator=generator).to(dtype) for length in lengths]
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
        out = paged_attention(q, self.cache, batch, scale=HEAD_SIZE**-0.5, window=self.window)
        return list(out.split([b - a for _, a, b in parts]))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1), (32, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equals_torch_attention(num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> None:
    lengths = [1, 31, 32, 33, 97]
    sequences = Sequences(lengths, num_heads=num_heads, num_kv_heads=num_kv_heads, dtype=dtype)
    for index, out in enumerate(sequences.step([(i, 0, n) for i, n in enumerate(lengths)])):
        q, k, v = (x[index].double().transpose(0, 1)[None] for x in (sequences.q, sequences.k, sequences.v))
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        tolerance = 1e-5 if dtype == torch.float32 else 8e-3  # fp32 sums, then one rounding to the dtype
        torch.testing.assert_close(out.double(), expected[0].transpose(0, 1), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("window", WINDOWS)
def test_chunks_and_neighbours_change_no_bit(
    num_heads: int, num_kv_heads: int, dtype: torch.dtype, window: int
) -> None:
    lengths = [70, 129, 5, 40]
    kind = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "window": window}
    whole = Sequences(lengths, dtype=dtype, **kind)
    expected = [whole.step([(i, 0, n)])[0] for i, n in enumerate(lengths)]
    cut = Sequences(lengths, dtype=dtype, **kind)
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
def test_a_window_hides_what_lies_before_it(window: int, dtype: torch.dtype) -> None:
    lengths = [1, 33, 140]
    sequences = Sequences(lengths, num_heads=4, num_kv_heads=2, dtype=dtype, window=window)
    outs = sequences.step([(i, 0, n) for i, n in enumerate(lengths)])
    for index, (length, out) in enumerate(zip(lengths, outs, strict=True)):
        q, k, v = (x[index].double().transpose(0, 1)[None] for x in (sequences.q, sequences.k, sequences.v))
        distance = torch.arange(length)[:, None] - torch.arange(length)
        mask = (distance >= 0) & (distance < window)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        tolerance = 1e-5 if dtype == torch.float32 else 8e-3  # fp32 sums, then one rounding to the dtype
        torch.testing.assert_close(out.double(), expected[0].transpose(0, 1), rtol=tolerance, atol=tolerance)


def test_a_window_of_the_whole_sequence_changes_no_bit() -> None:
    outs = [
        Sequences([129], num_heads=4, num_kv_heads=2, dtype=torch.float32, window=window).step([(0, 0, 129)])[0]
        for window in (0, 129, 1000)
    ]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


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
    with pytest.raises(ValueError, match="window must be at least 0, got -1"):
        paged_attention(torch.zeros(2, 4, 16), cache, batch, scale=1.0, window=-1)
    with pytest.raises(ValueError, match="k and v must be one shape"):
        store_kv_(cache, torch.zeros(2, 2, 16), torch.zeros(2, 1, 16), batch)


def test_opcheck() -> None:
    batch = AttentionBatch.from_spans([Span(start=0, num_tokens=2, block_table=[0])], tile_tokens=8)
    cache = torch.zeros(1, 2, 2, BLOCK_TOKENS, 16)
    ops = torch.ops.lorasrv
    torch.library.opcheck(ops.store_kv_.default, (cache, *torch.randn(2, 2, 2, 16), batch.slot_mapping))
    for window in (0, 1):
        arguments = (torch.randn(2, 4, 16), cache, batch.block_tables, batch.tiles, 8, 0.25, window)
        torch.library.opcheck(ops.paged_attention.default, arguments)
