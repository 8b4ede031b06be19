"""Dequantization of NF4 rows: the op as this machine serves it, beside the reference.

Correctness first: a timing is printed only for results that are equal bit for bit. The two take turns, and the median
of each is shown, so that other load on the machine meets both. What limits the op is written bytes, hence GB/s.

    python kernels/benchmarks/nf4_dequantize.py [--rounds N]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from lorasrv_kernels.cpu.library import load
from lorasrv_kernels.nf4 import dequantize, quantize, reference
from lorasrv_kernels.nf4.calls import Nf4Dequantize

SHAPES = ((256, 256), (2048, 2048), (1024, 4096), (4096, 1024))
DTYPES = (torch.bfloat16, torch.float32)


def measure(shape: tuple[int, int], dtype: torch.dtype, *, rounds: int) -> tuple[float, float]:
    """Returns the median seconds of the op and of the reference for one weight of `shape` [O, I].

    Raises:
        SystemExit: The results differ.
    """
    weight = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    storage = (
        weight.packed,
        weight.absmax,
        weight.nested_absmax,
        weight.offset,
        weight.out_features,
        weight.in_features,
    )
    served, specified = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)

    def op() -> None:
        dequantize(weight, out=served)

    def specification() -> None:
        reference.dequantize_(Nf4Dequantize(*storage, 0, specified))

    op()
    specification()
    if not torch.equal(served, specified):
        raise SystemExit(f"{shape} {dtype}: the op and its reference differ; no timing")
    pairs = [(seconds(op), seconds(specification)) for _ in range(rounds)]
    return statistics.median(first for first, _ in pairs), statistics.median(second for _, second in pairs)


def seconds(call: Callable[[], None]) -> float:
    """Returns the wall-clock seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> int:
    """Prints one line for each shape and dtype; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    path = "native" if load() else "PyTorch (no native library)"
    print(f"nf4 dequantize, {path}, torch {torch.__version__}, {torch.get_num_threads()} threads, {rounds} rounds")
    print(f"{'shape':>12} {'dtype':>9} {'op ms':>8} {'op GB/s':>8} {'reference ms':>13} {'ratio':>6}")
    for shape in SHAPES:
        for dtype in DTYPES:
            op, specification = measure(shape, dtype, rounds=rounds)
            rate = shape[0] * shape[1] * dtype.itemsize / op / 1e9
            name = str(dtype).removeprefix("torch.")
            size = f"{shape[0]}x{shape[1]}"
            ratio = specification / op
            print(f"{size:>12} {name:>9} {op * 1e3:8.3f} {rate:8.2f} {specification * 1e3:13.3f} {ratio:6.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
