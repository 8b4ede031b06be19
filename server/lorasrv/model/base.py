"""The base as adapters see it: which modules there are, their weights as served, and what identifies them all."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

import torch
from lorasrv_kernels.nf4 import NF4Weight
from torch import Tensor

from lorasrv.model.adapted_linear import Weight, weight_rows
from lorasrv.model.tensors import MODULES

_CHUNK_ELEMENTS = 1 << 18


class ServedBase:
    """What `lorasrv_adapters.normalize` asks of a base. Read-only; any thread may use it.

    Attributes:
        modules: name -> (O, I) of every linear an adapter may target, in module order.
        biases: module name -> [O] of every module with a bias, in float32 on the CPU.
    """

    def __init__(
        self, identity: str, stored: Callable[[], Iterator[tuple[str, Weight]]], *, dtype: torch.dtype
    ) -> None:
        """Takes the canonical config, a way to walk over all stored tensors in a fixed order, and the model's dtype."""
        self._identity = identity
        self._dtype = dtype
        self._stored = stored
        self._weights = {
            name.removesuffix(".weight"): weight
            for name, weight in stored()
            if name.removesuffix(".weight").endswith(MODULES)
        }
        self.modules: Mapping[str, tuple[int, int]] = {
            name: (weight.shape[0], weight.shape[1]) for name, weight in self._weights.items()
        }
        self.biases: Mapping[str, Tensor] = {
            name.removesuffix(".bias"): bias.to(device="cpu", dtype=torch.float32, copy=True)
            for name, bias in stored()
            if isinstance(bias, Tensor) and name.endswith(".bias")
        }

    def weight_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a module's weight as it is served, rounded to the model's dtype: a new [stop - start, I] float32.

        Raises:
            KeyError: there is no such module.
        """
        return weight_rows(self._weights[name], start, stop, dtype=self._dtype)

    @property
    def digest(self) -> str:
        """sha256 over config and all weights as served, 64 hex digits. Blocks: the first use reads the whole model.

        Bytes decide for what is held in 4 bits, numbers for the rest: one base held in float32 or, exactly, in
        bfloat16, quantized by the server or before, has one digest.
        """
        return self._digest

    # a cached_property itself does not pass for the `str` that callers ask for
    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(b"lorasrv-base-1\n" + self._identity.encode())
        for name, weight in self._stored():
            kind = "nf4" if isinstance(weight, NF4Weight) else "wide"
            digest.update(f"\n{name} {kind} {tuple(weight.shape)} ".encode())
            for piece in _pieces(weight):
                digest.update(piece.cpu().numpy().data)
        return digest.hexdigest()


def _pieces(weight: Weight) -> Iterator[Tensor]:
    if isinstance(weight, NF4Weight):
        yield from (weight.packed, weight.absmax, weight.nested_absmax, weight.offset)
    else:
        yield from (piece.float() for piece in weight.flatten().split(_CHUNK_ELEMENTS))
