"""A group of linear layers over one input, computed as one product, with every row's adapter on top.

Knows weights and where the adapters' rank rows are found; does not know which method an adapter used.
"""

from collections.abc import Sequence

import torch
from lorasrv_kernels.concatenate import concatenate
from lorasrv_kernels.cpu.decoder import Projection
from lorasrv_kernels.dense import dense_linear
from lorasrv_kernels.lora import lora_apply_
from lorasrv_kernels.nf4 import NF4Weight, dequantize, nf4_linear
from torch import Tensor

from lorasrv.model.batch import AdapterBatch

Weight = NF4Weight | Tensor
"""[O, I], as it is kept: 4 bits, or the dtype of the model."""


class AdaptedLinear:
    """G modules that share their input, e.g. the query, key and value projections.

    Attributes:
        out_features: the width of each module, in order.
    """

    def __init__(
        self, weights: Sequence[Weight], *, first_module: int, biases: Sequence[Tensor | None] | None = None
    ) -> None:
        """Takes one weight [O, I] per module, each quantized on its own; they are stored as one where they are alike.

        Weights that lie in a row in memory are not copied for that.

        Args:
            weights: of one I.
            first_module: place of the first module in the model's module order.
            biases: one [O] in the dtype of the activations per module, or None where a module has none.
        """
        self.out_features = tuple(weight.shape[0] for weight in weights)
        self._modules = range(first_module, first_module + len(weights))
        self._parts = _fuse(weights)
        self._has_bias = tuple(bias is not None for bias in biases or [None] * len(weights))
        self._bias = _fuse_biases(biases or (), self.out_features)

    def forward(self, x: Tensor, adapters: AdapterBatch) -> Tensor:
        """x: [T, I]. Returns a new contiguous [T, sum of out_features]."""
        products = [_product(x, part, exact=adapters.slots.exact) for part in self._parts]
        y = products[0] if len(products) == 1 else torch.cat(products, dim=1)
        if adapters.touches(self._modules):
            table = adapters.table[:, self._modules.start : self._modules.stop]
            lora_apply_(
                y,
                x,
                adapters.arena,
                table,
                out_features=self.out_features,
                slots=adapters.slots,
                bias=self._bias,
                max_rank=adapters.max_rank,
            )
        elif self._bias is not None:
            y += self._bias
        return y

    @property
    def fused_bias(self) -> Tensor | None:
        """[sum of out_features], zeros for a module without one; None where no module has one."""
        return self._bias

    def projection(self) -> Projection | None:
        """The group as one product; None where its weights are of several kinds."""
        if len(self._parts) != 1:
            return None
        (weight,), first = self._parts, self._modules.start
        return Projection(weight=weight, out_features=self.out_features, bias=self._bias, first_module=first)

    def weight(self, index: int) -> Weight:
        """The weight of one module, a view of what is stored."""
        if len(self._parts) == len(self.out_features):
            return self._parts[index]
        fused = self._parts[0]
        if isinstance(fused, NF4Weight):
            return fused.slice(index)
        views: tuple[Tensor, ...] = fused.split(self.out_features)
        return views[index]

    def bias(self, index: int) -> Tensor | None:
        """The bias [O] of one module, a view of what is stored; None where it has none."""
        if self._bias is None or not self._has_bias[index]:
            return None
        views: tuple[Tensor, ...] = self._bias.split(self.out_features)
        return views[index]


def weight_rows(weight: Weight, start: int, stop: int, *, dtype: torch.dtype) -> Tensor:
    """Rows `start` to `stop` of a weight as they meet activations of `dtype`: a new [stop - start, I] in float32."""
    if isinstance(weight, NF4Weight):
        return dequantize(weight, start_row=start, stop_row=stop, dtype=dtype).float()
    return weight[start:stop].to(torch.float32, copy=True)


def _product(x: Tensor, weight: Weight, *, exact: bool) -> Tensor:
    if isinstance(weight, NF4Weight):
        return nf4_linear(x, weight, exact=exact)
    return dense_linear(x, weight, exact=exact)


def _fuse(weights: Sequence[Weight]) -> tuple[Weight, ...]:
    quantized = [weight for weight in weights if isinstance(weight, NF4Weight)]
    dense = [weight for weight in weights if isinstance(weight, Tensor)]
    if len(weights) > 1 and len(quantized) == len(weights):
        return (NF4Weight.concatenate(quantized),)
    if len(weights) > 1 and len(dense) == len(weights):
        return (concatenate(dense),)
    return tuple(weights)


def _fuse_biases(biases: Sequence[Tensor | None], out_features: Sequence[int]) -> Tensor | None:
    """All biases one after the other, zeros for a module without one; None where there is none at all."""
    one = next((bias for bias in biases if bias is not None), None)
    if one is None:
        return None
    pairs = zip(biases, out_features, strict=True)
    return torch.cat([one.new_zeros(size) if bias is None else bias for bias, size in pairs])
