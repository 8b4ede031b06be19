"""A batch of several adapters in training: segments of mixed lengths, slices of mixed ranks, some with a d."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from lorasrv_kernels.lora.training import LowRank, lora_update
from lorasrv_kernels.lora.training.reference import LoraUpdate, LoraUpdateGrad, any_d
from torch import Tensor

RANKS = (8, 3, 0, 128, 16, 1, 64, 5)  # of segment and slice, round and round


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Arguments of `lora_update` and an upstream gradient."""

    y: Tensor
    x: Tensor
    adapters: list[list[LowRank | None]]
    out_features: list[int]
    segment_tokens: list[int]
    grad: Tensor

    @classmethod
    def random(
        cls,
        segment_tokens: Sequence[int],
        in_features: int,
        out_features: Sequence[int],
        dtype: torch.dtype,
        *,
        ranks: Sequence[int] = RANKS,
        with_d: bool = True,
    ) -> "Batch":
        """Of fixed numbers; the third segment trains nothing, every other slice has a d."""
        generator = torch.Generator().manual_seed(3)
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=wide)

        adapters: list[list[LowRank | None]] = []
        for segment in range(len(segment_tokens)):
            row: list[LowRank | None] = []
            for piece, width in enumerate(out_features):
                rank = ranks[(segment * len(out_features) + piece) % len(ranks)]
                a, b = normal(rank, in_features) / in_features**0.5, normal(width, rank) / max(1, rank) ** 0.5
                d = normal(width).abs() + 0.5 if with_d and (segment + piece) % 2 else None
                row.append(None if segment == 2 else LowRank(a=a, b=b, d=d, scale=0.5 + segment))
            adapters.append(row)
        tokens, width = sum(segment_tokens), sum(out_features)
        y, grad = normal(tokens, width).to(dtype), normal(tokens, width).to(dtype)
        x = normal(tokens, in_features).to(dtype)
        return cls(
            y=y, x=x, adapters=adapters, out_features=[*out_features], segment_tokens=[*segment_tokens], grad=grad
        )

    def call(self) -> LoraUpdate:
        """As the op takes it."""
        a, b, d, scales = [], [], [], []
        none = self.x.new_empty(0, dtype=self.x.dtype if self.x.dtype == torch.float64 else torch.float32)
        for row in self.adapters:
            for one, width in zip(row, self.out_features, strict=True):
                a.append(none.view(0, self.x.shape[1]) if one is None else one.a)
                b.append(none.view(width, 0) if one is None else one.b)
                d.append(none if one is None or one.d is None else one.d)
                scales.append(1.0 if one is None else one.scale)
        return LoraUpdate(self.y, self.x, a, b, d, scales, self.out_features, self.segment_tokens)

    def grad_call(self) -> LoraUpdateGrad:
        """As the op of the gradients takes it, with y only where something has a d."""
        y, *rest = self.call()
        return LoraUpdateGrad(self.grad, y if self.has_d() else None, *rest)

    def has_d(self) -> bool:
        """Whether any slice has a d."""
        return any_d(self.call().d)

    def tensors(self) -> list[Tensor]:
        """What gradients are taken of: y, x, every A, B and d that is not empty, in the order of the op's arguments."""
        y, x, a, b, d, *_ = self.call()
        return [y, x, *(factor for factor in (*a, *b, *d) if factor.numel())]

    def segment(self, index: int) -> "Batch":
        """One segment as a batch of its own."""
        start = sum(self.segment_tokens[:index])
        rows = slice(start, start + self.segment_tokens[index])
        return Batch(
            y=self.y[rows],
            x=self.x[rows],
            adapters=[self.adapters[index]],
            out_features=self.out_features,
            segment_tokens=[self.segment_tokens[index]],
            grad=self.grad[rows],
        )

    def double(self) -> "Batch":
        """The same numbers in float64."""
        return self._changed(torch.Tensor.double)

    def to(self, device: torch.device) -> "Batch":
        """The same numbers on a device."""
        return self._changed(lambda tensor: tensor.to(device))

    def trainable(self) -> "Batch":
        """The same numbers as leaves that want a gradient."""
        return replace(self._changed(lambda tensor: tensor.detach().clone().requires_grad_()), grad=self.grad)

    def update(self) -> Tensor:
        """The op's result."""
        return lora_update(
            self.y,
            self.x,
            segment_tokens=self.segment_tokens,
            adapters=self.adapters,
            out_features=self.out_features,
        )

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        adapters = [[None if one is None else _low_rank(one, change) for one in row] for row in self.adapters]
        y, x, grad = change(self.y), change(self.x), change(self.grad)
        return replace(self, y=y, x=x, grad=grad, adapters=adapters)


def _low_rank(one: LowRank, change: Callable[[Tensor], Tensor]) -> LowRank:
    d = None if one.d is None else change(one.d)
    return LowRank(a=change(one.a), b=change(one.b), d=d, scale=one.scale)
