"""Times causal attention over the paged cache: the op as this machine serves it, beside the PyTorch reference.

    python kernels/benchmarks/paged_attention.py [--threads 1] [--pairs 15] [--heads 32x8x64,32x32x64,16x2x128]

Decode steps of N sequences at one context, and prefills of one sequence. Timed only if both agree with the formula in
float64. Op and reference alternate (ABBA); a ratio is the time of the op over that of the other in one pair. Beside it
stands the op against itself: a ratio within its spread says nothing. GB/s are bytes of keys and values over the op's
time, where every sequence reads its own once.
"""

import argparse

import torch
from interleaved import compare, spread
from lorasrv_kernels.attention import (
    BLOCK_TOKENS,
    AttentionBatch,
    Span,
    paged_attention,
    reference,
    store_kv_,
    tile_tokens,
)
from lorasrv_kernels.cpu.isa import widest_isa
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

CASES = ((1, 1024, 1), (8, 256, 1), (8, 1024, 1), (16, 1024, 1), (1, 0, 256), (1, 768, 256))
"""Sequences, context before the step, tokens of each in the step."""

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--heads", default="32x8x64")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    isa = widest_isa()
    print(f"paged_attention, {'no native library' if isa is None else isa.name}, {arguments.threads} threads, ", end="")
    print(f"torch {torch.__version__}, {arguments.pairs} pairs\n")
    print("| H x Hkv x D | dtype | N | context | tokens | op us | GB/s | itself | PyTorch reference |")
    print("|---|---|---|---|---|---|---|---|---|")
    for heads in arguments.heads.split(","):
        for dtype in (torch.bfloat16, torch.float32):
            for case in CASES:
                shape = tuple(int(size) for size in heads.split("x"))
                name = f"{heads} | {str(dtype)[6:]} | {' | '.join(map(str, case))}"
                with torch.inference_mode():
                    cells = row(shape, *case, dtype, pairs=arguments.pairs)
                print(f"| {name} | {' | '.join(cells)} |", flush=True)


def row(
    heads: tuple[int, ...], num_sequences: int, context: int, num_tokens: int, dtype: torch.dtype, *, pairs: int
) -> list[str]:
    """The cells of one configuration."""
    num_heads, num_kv_heads, head_size = heads
    length = context + num_tokens
    width = -(-length // BLOCK_TOKENS)
    tables = torch.randperm(num_sequences * width).view(num_sequences, width).tolist()
    cache = torch.zeros(num_sequences * width, 2, num_kv_heads, BLOCK_TOKENS, head_size, dtype=dtype)
    k, v = torch.randn(2, num_sequences * length, num_kv_heads, head_size).to(dtype)
    q = torch.randn(num_sequences * num_tokens, num_heads, head_size).to(dtype)
    tile = tile_tokens(num_heads, num_kv_heads)
    whole = [Span(start=0, num_tokens=length, block_table=table) for table in tables]
    store_kv_(cache, k, v, AttentionBatch.from_spans(whole, tile_tokens=tile))
    step = [Span(start=context, num_tokens=num_tokens, block_table=table) for table in tables]
    batch = AttentionBatch.from_spans(step, tile_tokens=tile)
    scale = head_size**-0.5

    def op() -> Tensor:
        return paged_attention(q, cache, batch, scale=scale)

    def specification() -> Tensor:
        return reference.paged_attention(
            reference.PagedAttention(q, cache, batch.block_tables, batch.tiles, tile, scale, 0)
        )

    wanted = exact(q, k, v, num_sequences)
    for run in (op, specification):
        error = float((run().double() - wanted).norm() / wanted.norm())
        if error > TOLERANCE[dtype]:
            raise SystemExit(f"wrong result: relative error {error:.2e}")
    seconds, *itself = compare(op, op, pairs=pairs)
    _, *ratio = compare(op, specification, pairs=pairs)
    return [f"{1e6 * seconds:.1f}", f"{2 * k.nbytes / seconds / 1e9:.1f}", spread(*itself), spread(*ratio)]


def exact(q: Tensor, k: Tensor, v: Tensor, num_sequences: int) -> Tensor:
    """The last tokens of every sequence attend to all before them, in float64."""
    parts = (x.double().unflatten(0, (num_sequences, -1)).transpose(1, 2) for x in (q, k, v))
    queries, keys, values = parts
    mask = torch.ones(queries.shape[2], keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - queries.shape[2])
    out = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


if __name__ == "__main__":
    main()
