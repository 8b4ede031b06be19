"""Times the NF4 and the dense linear layer against PyTorch's `F.linear`, bitsandbytes and our own PyTorch path.

    python kernels/benchmarks/nf4_linear.py [--threads 2] [--pairs 15] [--shapes 256x256,704x256,4096x4096] [--isa NAME]

Candidate and baseline alternate (ABBA), so that both see the same machine; a ratio is that of one pair. Beside them
stands the candidate against itself: a ratio within its spread says nothing. Timed only if the results agree.
GB/s count the stored weight once. Seconds are the processor's where one thread runs, so that other processes disturb
less, and the clock's elsewhere.
"""

import argparse
import platform
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from interleaved import compare
from lorasrv_kernels.cpu.isa import force_isa, isa_in_use
from lorasrv_kernels.dense import dense_linear
from lorasrv_kernels.dense.reference import linear_ as dense_tiles_
from lorasrv_kernels.nf4 import dequantize, nf4_linear, op, quantize
from lorasrv_kernels.nf4.calls import Nf4LinearInto
from lorasrv_kernels.nf4.reference import linear_by_panels_ as nf4_by_panels_
from torch import Tensor
from torch.nn.functional import linear

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--shapes", default="256x256,704x256,4096x4096")
    parser.add_argument("--tokens", default="1,8,16,64,256")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--isa", help="an instruction set narrower than this machine's widest")
    arguments = parser.parse_args()
    force_isa(arguments.isa)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"{cpu_name()}, {arguments.threads} threads, torch {torch.__version__}, {arguments.pairs} pairs, ", end="")
    isa = isa_in_use()
    print(f"native instruction set {isa.name.lower() if isa else 'none'}\n")
    print(
        "| weight | dtype | T | nf4_linear_ ms | GB/s | itself | its PyTorch path | dequantize_4bit + F.linear ", end=""
    )
    print("| F.linear | dense_linear_ ms | its PyTorch path | F.linear |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for shape in arguments.shapes.split(","):
        for dtype in (getattr(torch, name) for name in arguments.dtypes.split(",")):
            for tokens in arguments.tokens.split(","):
                rows, columns = (int(size) for size in shape.split("x"))
                with torch.inference_mode():
                    cells = row(rows, columns, int(tokens), dtype, pairs=arguments.pairs)
                print(f"| {shape} | {str(dtype)[6:]} | {tokens} | {' | '.join(cells)} |", flush=True)


def row(out_features: int, in_features: int, num_tokens: int, dtype: torch.dtype, *, pairs: int) -> list[str]:
    """The cells of one configuration: milliseconds, then ratios candidate / baseline."""
    source = torch.randn(out_features, in_features).to(dtype)
    weight = quantize(source)
    dense = dequantize(weight, dtype=dtype)
    x = torch.randn(num_tokens, in_features).to(dtype)
    out, dense_out = torch.empty(2, num_tokens, out_features, dtype=dtype)
    from_bitsandbytes = bitsandbytes_linear(source, x)

    def candidate() -> Tensor:
        return nf4_linear(x, weight, out=out)

    def dense_candidate() -> Tensor:
        return dense_linear(x, dense, out=dense_out)

    def nf4_reference() -> Tensor:
        storage = (weight.packed, weight.absmax, weight.nested_absmax, weight.offset, weight.out_features)
        nf4_by_panels_(Nf4LinearInto(x, *storage, dense_out), dequantize=lambda call: op.dequantize_(*call))
        return dense_out

    def dense_reference() -> Tensor:
        dense_tiles_(x, dense, dense_out)
        return dense_out

    def library() -> Tensor:
        return linear(x, dense)

    expected = x.double() @ dense.double().T
    for run in (candidate, nf4_reference, from_bitsandbytes, library, dense_candidate, dense_reference):
        error = float((run().double() - expected).norm() / expected.norm())
        if error > TOLERANCE[dtype]:
            raise SystemExit(f"wrong result: relative error {error:.2e}")
    nf4 = [compare(candidate, other, pairs=pairs) for other in (candidate, nf4_reference, from_bitsandbytes, library)]
    plain = [compare(dense_candidate, other, pairs=pairs) for other in (dense_reference, library)]
    stored = sum(part.nbytes for part in (weight.packed, weight.absmax, weight.nested_absmax))
    milliseconds, *ratios = cells(nf4)
    return [milliseconds, f"{stored / nf4[0][0] / 1e9:.1f}", *ratios, *cells(plain)]


def cells(results: list[tuple[float, float, float, float]]) -> list[str]:
    """Milliseconds of a candidate, then its ratios with their quartiles."""
    return [f"{1e3 * results[0][0]:.3f}"] + [
        f"{middle:.2f} [{low:.2f}, {high:.2f}]" for _, low, middle, high in results
    ]


def bitsandbytes_linear(source: Tensor, x: Tensor) -> Callable[[], Tensor]:
    """The same layer as bitsandbytes runs it on a CPU: a fresh dense matrix at every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from bitsandbytes import functional
    packed, state = functional.quantize_4bit(source, blocksize=64, quant_type="nf4", compress_statistics=True)
    return lambda: linear(x, functional.dequantize_4bit(packed, state))


def cpu_name() -> str:
    """The processor's name, where the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
