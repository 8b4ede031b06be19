"""Times the gradient of the NF4 linear layer against PyTorch's dense product, bitsandbytes and our own PyTorch path.

    python kernels/benchmarks/nf4_gradient.py [--threads 2] [--pairs 15] [--shapes 1280x1280,4096x4096] [--tokens 1024]

Candidate and baseline alternate (ABBA); a ratio is that of one pair. Beside them stands the candidate against itself.
Timed only if the results agree. bitsandbytes' time is that of the backward pass of its `matmul_4bit`; the dense product
has its weights in 16 or 32 bits already.
"""

import argparse
import warnings
from collections.abc import Callable

import torch
from interleaved import compare, spread
from lorasrv_kernels.cpu.isa import isa_in_use
from lorasrv_kernels.nf4 import dequantize, op, quantize, reference
from lorasrv_kernels.nf4.calls import Nf4LinearGrad
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--shapes", default="1280x1280,4096x4096")
    parser.add_argument("--tokens", default="256,1024")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    isa = isa_in_use()
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.pairs} pairs, ", end="")
    print(f"native instruction set {isa.name.lower() if isa else 'none'}\n")
    print("| weight | dtype | T | nf4_linear_grad ms | itself | dense product | bitsandbytes | its PyTorch path |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in arguments.shapes.split(","):
        for dtype in (getattr(torch, name) for name in arguments.dtypes.split(",")):
            for tokens in arguments.tokens.split(","):
                rows, columns = (int(size) for size in shape.split("x"))
                cells = row(rows, columns, int(tokens), dtype, pairs=arguments.pairs)
                print(f"| {shape} | {str(dtype)[6:]} | {tokens} | {' | '.join(cells)} |", flush=True)


def row(out_features: int, in_features: int, num_tokens: int, dtype: torch.dtype, *, pairs: int) -> list[str]:
    """The cells of one configuration: milliseconds, then ratios candidate / baseline."""
    source = torch.randn(out_features, in_features).to(dtype)
    weight = quantize(source)
    storage = (weight.packed, weight.absmax, weight.nested_absmax, weight.offset, weight.out_features, in_features)
    dense = dequantize(weight, dtype=dtype)
    grad = torch.randn(num_tokens, out_features).to(dtype)

    def candidate() -> Tensor:
        return op.linear_grad(grad, *storage)

    def library() -> Tensor:
        return grad @ dense

    def specification() -> Tensor:
        return reference.linear_grad_by_panels(
            Nf4LinearGrad(grad, *storage), dequantize=lambda call: op.dequantize_(*call)
        )

    baselines = (candidate, library, bitsandbytes_backward(source, grad), specification)
    expected = grad.double() @ dense.double()
    for run in baselines:
        error = float((run().double() - expected).norm() / expected.norm())
        if error > TOLERANCE[dtype]:
            raise SystemExit(f"wrong result: relative error {error:.2e}")
    results = [compare(candidate, other, pairs=pairs) for other in baselines]
    return [f"{1e3 * results[0][0]:.2f}", *(spread(*quartiles) for _, *quartiles in results)]


def bitsandbytes_backward(source: Tensor, grad: Tensor) -> Callable[[], Tensor]:
    """The backward pass of bitsandbytes' layer over the same weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes
    packed, state = bitsandbytes.functional.quantize_4bit(
        source, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    x = torch.zeros(grad.shape[0], source.shape[1], dtype=grad.dtype, requires_grad=True)
    y = bitsandbytes.matmul_4bit(x, packed.t(), state)

    def backward() -> Tensor:
        (result,) = torch.autograd.grad(y, x, grad, retain_graph=True)
        return result

    return backward


if __name__ == "__main__":
    main()
