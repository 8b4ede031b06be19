"""Times the batched low-rank update: the op as this machine serves it, beside the PyTorch reference.

    python kernels/benchmarks/lora_apply.py [--threads 1] [--pairs 15] [--shapes 1280x1280,4096x4096] [--tokens 1,256]

T token rows are spread evenly over 8 adapters of ranks 8, 16 and 32. Timed only if both agree with the formula in
float64. Op and reference alternate (ABBA); a ratio is the time of the op over that of the other in one pair. Beside it
stands the op against itself: a ratio within its spread says nothing. GB/s are bytes of A and B over the op's time.
"""

import argparse

import torch
from interleaved import compare, spread
from lorasrv_kernels.batch import SlotBatch
from lorasrv_kernels.cpu.isa import widest_isa
from lorasrv_kernels.lora import lora_apply_, reference
from lorasrv_kernels.table import ABSENT_ROW, Column
from torch import Tensor

RANKS = (8, 16, 32, 8, 16, 32, 8, 16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--shapes", default="1280x1280,4096x4096")
    parser.add_argument("--tokens", default="1,8,16,256")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    isa = widest_isa()
    print(f"lora_apply_, {'no native library' if isa is None else isa.name}, {arguments.threads} threads, ", end="")
    print(f"torch {torch.__version__}, {arguments.pairs} pairs\n")
    print("| O x I | dtype | T | op us | GB/s | itself | PyTorch reference |")
    print("|---|---|---|---|---|---|---|")
    for shape in arguments.shapes.split(","):
        out_features, in_features = (int(size) for size in shape.split("x"))
        for dtype in (torch.bfloat16, torch.float32):
            for tokens in map(int, arguments.tokens.split(",")):
                with torch.inference_mode():
                    cells = row(out_features, in_features, tokens, dtype, pairs=arguments.pairs)
                print(f"| {shape} | {str(dtype)[6:]} | {tokens} | {' | '.join(cells)} |", flush=True)


def row(out_features: int, in_features: int, num_tokens: int, dtype: torch.dtype, *, pairs: int) -> list[str]:
    """The cells of one configuration."""
    arena, table = adapters(out_features, in_features, dtype)
    x, y = torch.randn(num_tokens, in_features).to(dtype), torch.zeros(num_tokens, out_features, dtype=dtype)
    slots = [token % len(RANKS) for token in range(num_tokens)]
    batch = SlotBatch.from_slots(slots)
    tiles = (batch.rows, batch.weights, batch.tile_slots, batch.tile_starts, batch.base_rows, None)

    def op() -> None:
        lora_apply_(y, x, arena, table, out_features=[out_features], slots=batch)

    def specification() -> None:
        reference.lora_apply_(reference.LoraApply(y, x, arena, table, [out_features], *tiles))

    expected = exact(x, arena, table, slots, out_features)
    for run in (op, specification):
        y.zero_()
        run()
        error = float((y.double() - expected).norm() / expected.norm())
        if error > TOLERANCE[dtype]:
            raise SystemExit(f"wrong result: relative error {error:.2e}")
    seconds, *itself = compare(op, op, pairs=pairs)
    _, *ratio = compare(op, specification, pairs=pairs)
    num_bytes = sum(RANKS[slot] for slot in set(slots)) * (out_features + in_features) * dtype.itemsize
    return [f"{1e6 * seconds:.1f}", f"{num_bytes / seconds / 1e9:.1f}", spread(*itself), spread(*ratio)]


def adapters(out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An arena and the table of its slots [S, 1, 8]."""
    table = torch.tensor(ABSENT_ROW).repeat(len(RANKS), 1, 1)
    generator = torch.Generator().manual_seed(0)
    start = 0
    for entry, rank in zip(table[:, 0], RANKS, strict=True):
        entry[Column.A], entry[Column.B_T], entry[Column.RANK] = start, start + rank * in_features, rank
        start += rank * (in_features + out_features)
    return torch.randn(start, generator=generator).mul_(in_features**-0.25).to(dtype), table


def exact(x: Tensor, arena: Tensor, table: Tensor, slots: list[int], out_features: int) -> Tensor:
    """The update of every row in float64."""
    rows = []
    for token, slot in zip(x.double(), slots, strict=True):
        rank, a, b_t = (int(table[slot, 0, column]) for column in (Column.RANK, Column.A, Column.B_T))
        shrunk = arena[a : a + rank * x.shape[1]].view(rank, -1).double() @ token
        rows.append(shrunk @ arena[b_t : b_t + rank * out_features].view(rank, -1).double())
    return torch.stack(rows)


if __name__ == "__main__":
    main()
