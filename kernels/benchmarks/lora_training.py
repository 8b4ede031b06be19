"""Times the trainable low-rank update, forward and backward, against PyTorch's products as PEFT and we would call them.

    python kernels/benchmarks/lora_training.py [--threads 2] [--pairs 15]

Candidate and baseline alternate (ABBA); a ratio is that of one pair. Beside them stands the candidate against itself.
Timed only if the results agree. "float32 products" is the reference: activations are cast to the dtype of A and B, as
PEFT does without autocast. "Rounded products" casts A and B to the activations' dtype instead, as PEFT does under
autocast, which rounds x A^T and every gradient.
"""

import argparse

import torch
from interleaved import compare, spread
from lorasrv_kernels.cpu.isa import isa_in_use
from lorasrv_kernels.lora.training import LowRank, lora_update, reference
from torch import Tensor
from torch.nn.functional import linear

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
CASES = (
    # (O, I, rank, adapters, with d)
    (1280, 1280, 16, 1, False),
    (1280, 1280, 16, 4, False),
    (1280, 1280, 16, 1, True),
    (3584, 1280, 64, 1, False),
    (4096, 4096, 16, 1, False),
    (4096, 4096, 16, 4, True),
)


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=1024)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    isa = isa_in_use()
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.pairs} pairs, ", end="")
    print(f"{arguments.tokens} tokens, native instruction set {isa.name.lower() if isa else 'none'}\n")
    print("| O x I | rank | adapters | dtype | forward + backward ms | itself | float32 products | rounded products |")
    print("|---|---|---|---|---|---|---|---|")
    for out_features, in_features, rank, adapters, with_d in CASES:
        for dtype in (torch.bfloat16, torch.float32):
            batch = Batch(arguments.tokens, out_features, in_features, rank, adapters, dtype, with_d=with_d)
            cells = " | ".join(batch.compare(pairs=arguments.pairs))
            kind = f"{adapters} {'DoRA' if with_d else 'LoRA'}"
            print(f"| {out_features}x{in_features} | {rank} | {kind} | {str(dtype)[6:]} | {cells} |", flush=True)


class Batch:
    """Adapters over equal shares of the tokens, and three ways to train them."""

    def __init__(
        self,
        tokens: int,
        out_features: int,
        in_features: int,
        rank: int,
        adapters: int,
        dtype: torch.dtype,
        *,
        with_d: bool,
    ) -> None:
        self.y = torch.randn(tokens, out_features).to(dtype).requires_grad_()
        self.x = torch.randn(tokens, in_features).to(dtype).requires_grad_()
        self.grad = torch.randn(tokens, out_features).to(dtype)
        self.segment_tokens = [tokens // adapters] * adapters
        self.adapters = [
            LowRank(
                a=(torch.randn(rank, in_features) / in_features**0.5).requires_grad_(),
                b=(torch.randn(out_features, rank) / rank**0.5).requires_grad_(),
                d=(torch.rand(out_features) + 0.5).requires_grad_() if with_d else None,
                scale=2.0,
            )
            for _ in range(adapters)
        ]
        factors = [(one.a, one.b) if one.d is None else (one.a, one.b, one.d) for one in self.adapters]
        self.leaves = [self.y, self.x, *(factor for group in factors for factor in group)]

    def ours(self) -> tuple[Tensor, ...]:
        """The op; returns the result and every gradient, as the others do."""
        rows = [[one] for one in self.adapters]
        sizes = {"segment_tokens": self.segment_tokens, "out_features": [self.y.shape[1]]}
        return self._backward(lora_update(self.y, self.x, adapters=rows, **sizes))

    def float32_products(self) -> tuple[Tensor, ...]:
        """The reference, differentiated by PyTorch."""
        none = torch.empty(0)
        call = reference.LoraUpdate(
            y=self.y,
            x=self.x,
            a=[one.a for one in self.adapters],
            b=[one.b for one in self.adapters],
            d=[none if one.d is None else one.d for one in self.adapters],
            scales=[one.scale for one in self.adapters],
            out_features=[self.y.shape[1]],
            segment_tokens=self.segment_tokens,
        )
        return self._backward(reference.lora_update(call))

    def rounded_products(self) -> tuple[Tensor, ...]:
        """Everything in the activations' dtype."""
        parts, dtype = [], self.x.dtype
        rows = self.y.split(self.segment_tokens), self.x.split(self.segment_tokens)
        for one, y, x in zip(self.adapters, *rows, strict=True):
            part = y + one.scale * linear(linear(x, one.a.to(dtype)), one.b.to(dtype))
            parts.append(part if one.d is None else part * one.d.to(dtype))
        return self._backward(torch.cat(parts))

    def compare(self, *, pairs: int) -> list[str]:
        """Milliseconds, then ratios ours / other."""
        expected = self.float32_products()
        for run in (self.ours, self.rounded_products):
            for actual, exact in zip(run(), expected, strict=True):
                error = ((actual.double() - exact.double()).norm() / exact.double().norm()).item()
                if error > TOLERANCE[self.x.dtype]:
                    raise SystemExit(f"wrong result: relative error {error:.2e}")
        others = (self.ours, self.float32_products, self.rounded_products)
        results = [compare(self.ours, other, pairs=pairs) for other in others]
        return [f"{1e3 * results[0][0]:.2f}", *(spread(*quartiles) for _, *quartiles in results)]

    def _backward(self, result: Tensor) -> tuple[Tensor, ...]:
        return result, *torch.autograd.grad(result, self.leaves, self.grad)


if __name__ == "__main__":
    main()
