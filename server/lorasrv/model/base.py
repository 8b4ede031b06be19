"""The base as adapters see it: which modules there are, their weights as served, and what identifies them all."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property

import torch
from lorasrv_adapters.base import BaseModule, ModuleKind
from lorasrv_kernels.nf4 import NF4Weight
from torch import Tensor

from lorasrv.model.adapted_linear import Weight, weight_rows
from lorasrv.model.config import ModelConfig
from lorasrv.model.tensors import EMBEDDING, HEAD, MODULES, module_order, other_modules

_CHUNK_ELEMENTS = 1 << 18


class ServedBase:
    """What `lorasrv_adapters.base.BaseModel` asks of a base. Read-only; any thread may use it.

    Attributes:
        modules: every module by its name, those of the adapters' table first, in its order.
        tied: whether the head's weight is the embedding's.
        dtype: of everything that is not quantized.
    """

    def __init__(
        self, config: ModelConfig, stored: Callable[[], Iterator[tuple[str, Weight]]], *, dtype: torch.dtype
    ) -> None:
        """Takes the config, a way to walk over all stored tensors in a fixed order, and the model's dtype."""
        self._identity = config.identity()
        self._stored = stored
        self._weights = dict(stored())
        self.tied = HEAD not in self._weights
        if self.tied:
            self._weights[HEAD] = self._weights[EMBEDDING]
        self.dtype = dtype
        self.modules: Mapping[str, BaseModule] = {
            **{name: self._module(name) for name in module_order(config)},
            **dict.fromkeys(other_modules(config), BaseModule(kind="other")),
        }

    def weight_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a module's weight as it is served, rounded to the model's dtype: a new [stop - start, I] float32.

        They are on the model's device.

        Raises:
            KeyError: there is no such module.
        """
        return weight_rows(self._weights[f"{name}.weight"], start, stop, dtype=self.dtype)

    def _module(self, name: str) -> BaseModule:
        weight, bias = self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias")
        rows, width = (1, *weight.shape)[-2:]
        if name.endswith(MODULES):
            wide = bias.to(device="cpu", dtype=torch.float32, copy=True) if isinstance(bias, Tensor) else None
            return BaseModule(kind="linear", out_features=rows, in_features=width, bias=wide)
        if f"{name}.weight" == EMBEDDING:
            return BaseModule(kind="embedding", out_features=width, in_features=rows)
        kind: ModuleKind = "head" if f"{name}.weight" == HEAD else "norm"
        return BaseModule(kind=kind, out_features=rows, in_features=width)

    @property
    def digest(self) -> str:
        """sha256 over config and weights, 64 hex digits. Blocks: the first use reads the whole model.

        Bytes decide for what is held in 4 bits, numbers rounded to bfloat16 for the rest: one base has one digest,
        served in float32 or in bfloat16, quantized by the server or by somebody before.
        """
        return self._digest

    # a cached_property itself does not pass for the `str` that callers ask for
    @cached_property
    def _digest(self) -> str:
        return base_digest(self._identity, self._stored())


def base_digest(identity: str, stored: Iterable[tuple[str, Weight]]) -> str:
    """sha256 over a config and weights, 64 hex digits; `ServedBase.digest` says what decides.

    Args:
        identity: what `ModelConfig.identity` says.
        stored: every tensor in the order of `lorasrv.model.tensors.stored_names`.
    """
    digest = hashlib.sha256(b"lorasrv-base-1\n" + identity.encode())
    for name, weight in stored:
        kind = "nf4" if isinstance(weight, NF4Weight) else "wide"
        digest.update(f"\n{name} {kind} {tuple(weight.shape)} ".encode())
        for piece in _pieces(weight):
            digest.update(piece.cpu().numpy().data)
    return digest.hexdigest()


def _pieces(weight: Weight) -> Iterator[Tensor]:
    if isinstance(weight, NF4Weight):
        yield from (weight.packed, weight.absmax, weight.nested_absmax, weight.offset)
    else:
        # numpy has no bfloat16
        yield from (piece.bfloat16().view(torch.int16) for piece in weight.flatten().split(_CHUNK_ELEMENTS))
