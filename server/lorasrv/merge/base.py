"""The base that is merged into, read from its files one matrix at a time. Knows no adapter and no result.

`dequantized` weights are what a server of NF4 computes with; `original` ones are those of the folder.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Literal

import torch
from lorasrv_adapters.base import BaseModule
from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.nf4 import NF4Weight, quantize
from torch import Tensor

from lorasrv.errors import ModelLoadError
from lorasrv.model import prequantized
from lorasrv.model.adapted_linear import Weight, weight_rows
from lorasrv.model.base import base_digest
from lorasrv.model.checkpoint import Checkpoint
from lorasrv.model.config import ModelConfig
from lorasrv.model.tensors import (
    EMBEDDING,
    HEAD,
    bias_shapes,
    linear_shapes,
    module_order,
    other_modules,
    stored_names,
    wide_shapes,
)

Weights = Literal["dequantized", "original"]
"""Which weights an update is added to."""


class StreamedBase:
    """What `lorasrv_adapters.base.BaseModel` asks of a base; keeps one quantized matrix at most.

    Attributes:
        config: the model's.
        modules: every module by its name, those of the adapters' table first, in its order.
        tied: whether the head's weight is the embedding's.
        dtype: weights are given in it, float32.
    """

    def __init__(
        self, config: ModelConfig, checkpoint: Checkpoint, *, weights: Weights, trained_on: Weights = "dequantized"
    ) -> None:
        """Keeps the open checkpoint of a folder that can be served.

        Args:
            config: the model's.
            checkpoint: closed by the caller, after use.
            weights: which weights are given.
            trained_on: which weights the digest is of: those that adapters record.

        Raises:
            ModelLoadError: the original weights are asked for, and the folder has only quantized ones.
        """
        self.config = config
        self.tied = config.tie_word_embeddings
        self.dtype = torch.float32
        self._checkpoint = checkpoint
        self._weights: Weights = weights
        self._trained_on: Weights = trained_on
        self._linear = linear_shapes(config)
        self._biases = bias_shapes(config)
        self._wide = wide_shapes(config)
        self._last: tuple[str, NF4Weight] | None = None
        quantized = [name for name in self._linear if prequantized.is_quantized(checkpoint, name)]
        if weights == "original" and quantized:
            raise ModelLoadError(
                [
                    f"the folder holds {len(quantized)} of {len(self._linear)} matrices in 4 bits only, {quantized[0]} "
                    "among them; give the folder of the original weights, or merge into the dequantized ones"
                ]
            )
        # what is wide beside quantized matrices is served as it is
        self._quantizes = not quantized
        self.modules: Mapping[str, BaseModule] = {
            **{name: self._module(name) for name in module_order(config)},
            **dict.fromkeys(other_modules(config), BaseModule(kind="other")),
        }

    @property
    def digest(self) -> str:
        """That of the base as adapters record it, 64 hex digits. Blocks: the first use reads the whole model."""
        return self._digest

    # a cached_property itself does not pass for the `str` that callers ask for
    @cached_property
    def _digest(self) -> str:
        return base_digest(self.config.identity(), self._stored(self._trained_on))

    def weight_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a module's weight: a new [stop - start, width] float32.

        Raises:
            KeyError: there is no such module.
        """
        return weight_rows(self._weight(name, self._weights), start, stop, dtype=self.dtype)

    def weight(self, name: str) -> Tensor:
        """A module's weight as the Hugging Face model has it: a new float32 tensor."""
        (rows, *_) = self.modules[name].weight_shape
        return self.weight_rows(name, 0, rows)

    def bias(self, name: str) -> Tensor | None:
        """A module's bias: [O] float32, or None."""
        return self.modules[name].bias

    def stored_dtype(self, name: str) -> torch.dtype:
        """Of a tensor of the folder; of one that is quantized, or that is not there, what the embedding has."""
        quantized = name in self._linear and prequantized.is_quantized(self._checkpoint, name)
        there = name in self._checkpoint.shapes and not quantized
        return self._checkpoint.tensor(name if there else EMBEDDING).dtype

    def _stored(self, weights: Weights) -> Iterator[tuple[str, Weight]]:
        for name in stored_names(self.config):
            if name.endswith(".weight"):
                yield name, self._weight(name.removesuffix(".weight"), weights)
            else:
                yield name, self._checkpoint.tensor(name)

    def _weight(self, module: str, weights: Weights) -> Weight:
        name = EMBEDDING if self.tied and f"{module}.weight" == HEAD else f"{module}.weight"
        if name in self._linear and prequantized.is_quantized(self._checkpoint, name):
            return prequantized.read(self._checkpoint, name)
        stored = self._checkpoint.tensor(name)
        if name not in self._linear or weights == "original" or not self._quantizes:
            return stored
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = name, _quantized(name, stored)
        return self._last[1]

    def _module(self, module: str) -> BaseModule:
        name = f"{module}.weight"
        if name in self._linear:
            rows, width = self._linear[name]
            bias = None
            if f"{module}.bias" in self._biases:
                bias = self._checkpoint.tensor(f"{module}.bias").to(torch.float32, copy=True)
            return BaseModule(kind="linear", out_features=rows, in_features=width, bias=bias)
        if name == EMBEDDING:
            return BaseModule(
                kind="embedding", out_features=self.config.hidden_size, in_features=self.config.vocab_size
            )
        if name == HEAD:
            return BaseModule(kind="head", out_features=self.config.vocab_size, in_features=self.config.hidden_size)
        return BaseModule(kind="norm", out_features=1, in_features=self._wide[name][0])


def _quantized(name: str, stored: Tensor) -> NF4Weight:
    try:
        return quantize(stored)
    except KernelError as error:
        raise ModelLoadError([f"tensor {name}: {error}"]) from error
