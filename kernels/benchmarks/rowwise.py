"""Times norm, rotation and gated activation: the ops as this machine serves them, beside the PyTorch reference.

    python kernels/benchmarks/rowwise.py [--threads 1] [--pairs 15] [--tokens 1,16,256]

Rows 2048 wide, heads 32 + 8 of size 64, and gates 8192 wide, as in a Llama of 1B parameters. Timed only if both agree.
Op and reference alternate (ABBA); a ratio is the time of the op over that of the other in one pair. Beside it stands
the op against itself: a ratio within its spread says nothing.
"""

import argparse

import torch
from interleaved import Run, compare, spread
from lorasrv_kernels.cpu.isa import widest_isa
from lorasrv_kernels.rowwise import reference, rms_norm, rotate_, silu_mul


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--tokens", default="1,16,256")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    isa = widest_isa()
    print(f"rowwise, {'no native library' if isa is None else isa.name}, {arguments.threads} threads, ", end="")
    print(f"torch {torch.__version__}, {arguments.pairs} pairs\n")
    print("| op | dtype | T | op us | itself | PyTorch reference |")
    print("|---|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float32):
        for tokens in map(int, arguments.tokens.split(",")):
            with torch.inference_mode():
                for name, op, specification in candidates(tokens, dtype):
                    seconds, *itself = compare(op, op, pairs=arguments.pairs)
                    _, *ratio = compare(op, specification, pairs=arguments.pairs)
                    cells = f"{1e6 * seconds:.1f} | {spread(*itself)} | {spread(*ratio)}"
                    print(f"| {name} | {str(dtype)[6:]} | {tokens} | {cells} |", flush=True)


def candidates(tokens: int, dtype: torch.dtype) -> list[tuple[str, Run, Run]]:
    """Name, op and reference, both right.

    Raises:
        SystemExit: They differ.
    """
    heads = torch.randn(tokens, 48, 64).to(dtype)[:, :40]
    turns = torch.rand(tokens, 1, 32) * 100
    angles = torch.cat([turns.cos(), turns.sin()], dim=-1)
    gate, up = torch.randn(tokens, 2 * 8192).to(dtype).chunk(2, dim=1)
    turned, expected = heads.clone(), heads.clone()
    rotate_(turned, angles)
    reference.rotate_(reference.Rotate(expected, angles))
    # one rounding to the dtype may fall the other way
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    hidden, weight = torch.randn(tokens, 2048).to(dtype), torch.randn(2048).to(dtype)
    norm_call, silu_call = reference.RmsNorm(hidden, weight, 1e-5), reference.SiluMul(gate, up)
    normed = rms_norm(hidden, weight, 1e-5), reference.rms_norm(norm_call)
    product, specified = silu_mul(gate, up), reference.silu_mul(silu_call)
    pairs = (normed, (product, specified))
    if not torch.equal(turned, expected) or not all(
        torch.allclose(*pair, rtol=tolerance, atol=tolerance) for pair in pairs
    ):
        raise SystemExit("an op and its reference differ; no timing")
    return [
        ("rms_norm", lambda: rms_norm(hidden, weight, 1e-5), lambda: reference.rms_norm(norm_call)),
        ("rotate_", lambda: rotate_(heads, angles), lambda: reference.rotate_(reference.Rotate(heads, angles))),
        ("silu_mul", lambda: silu_mul(gate, up), lambda: reference.silu_mul(silu_call)),
    ]


if __name__ == "__main__":
    main()
