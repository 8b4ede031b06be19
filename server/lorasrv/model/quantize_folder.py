"""A model folder of 16 or 32 bit weights to one in NF4, tensor by tensor from the memory map to the new file.

Never holds more than one quantized matrix. Knows neither the file format nor the arithmetic.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.nf4 import quantize
from torch import Tensor

from lorasrv.errors import ModelLoadError
from lorasrv.model import prequantized
from lorasrv.model.adapted_linear import Weight
from lorasrv.model.checkpoint import Checkpoint
from lorasrv.model.folder import open_model_folder
from lorasrv.model.quantized_writer import WeightSpec, write_folder
from lorasrv.model.tensors import EMBEDDING, linear_shapes, wide_shapes

_CHUNK_ELEMENTS = 1 << 18

Progress = Callable[[int, int], None]
"""Told after every weight of how many parameters are done, and of how many there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedFolder:
    """What was written."""

    folder: Path
    num_quantized: int
    """Matrices in 4 bits."""
    num_wide: int
    """Tensors that stayed in 16 or 32 bit: embedding, norms, biases, an untied head."""
    num_parameters: int
    source_bytes: int
    """Of the weights before."""
    num_bytes: int
    """Of the file with the weights."""

    @property
    def bits_per_parameter(self) -> float:
        """Over all weights, the ones in 16 or 32 bit included."""
        return 8 * self.num_bytes / self.num_parameters


def quantize_folder(
    source: Path, folder: Path, *, dtype: torch.dtype | None = None, progress: Progress | None = None
) -> QuantizedFolder:
    """Writes the NF4 version of a model folder, complete or not at all; blocks, for large models for minutes.

    Args:
        source: folder with `config.json` and safetensors files in 16 or 32 bit.
        folder: the new folder; its parent must exist.
        dtype: of what is not quantized; by default every tensor stays as it is.
        progress: told how far it is.

    Raises:
        ModelLoadError: the source cannot be served, or is quantized already; lists everything that is wrong.
        FileExistsError: `folder` is there already, or being written.
        DiskFullError: there is no room for it.
    """
    config, checkpoint = open_model_folder(source)
    with checkpoint:
        _check_wide(checkpoint, linear_shapes(config))
        served = dtype or checkpoint.tensor(EMBEDDING).dtype
        specs = [
            WeightSpec(name=name, shape=shape, dtype=dtype or checkpoint.tensor(name).dtype, quantized=False)
            for name, shape in wide_shapes(config).items()
        ]
        _check_range(checkpoint, specs)
        specs += [
            WeightSpec(name=name, shape=shape, dtype=served, quantized=True)
            for name, shape in linear_shapes(config).items()
        ]
        num_parameters = sum(math.prod(spec.shape) for spec in specs)
        weights = _weights(checkpoint, specs, progress or (lambda *_: None), num_parameters)
        num_bytes = write_folder(folder, specs, weights, source=source, dtype=served)
        return QuantizedFolder(
            folder=folder,
            num_quantized=sum(spec.quantized for spec in specs),
            num_wide=sum(not spec.quantized for spec in specs),
            num_parameters=num_parameters,
            source_bytes=sum(checkpoint.stored_bytes(spec.name).nbytes for spec in specs),
            num_bytes=num_bytes,
        )


def _weights(
    checkpoint: Checkpoint, specs: list[WeightSpec], progress: Progress, num_parameters: int
) -> Iterator[tuple[str, Weight]]:
    done = 0
    for spec in specs:
        stored = checkpoint.tensor(spec.name)
        yield spec.name, _quantized(spec.name, stored) if spec.quantized else stored
        done += stored.numel()
        progress(done, num_parameters)


def _quantized(name: str, stored: Tensor) -> Weight:
    try:
        return quantize(stored)
    except KernelError as error:
        raise ModelLoadError([f"tensor {name}: {error}"]) from error


def _check_wide(checkpoint: Checkpoint, names: dict[str, tuple[int, int]]) -> None:
    quantized = [name for name in names if prequantized.is_quantized(checkpoint, name)]
    if quantized:
        raise ModelLoadError(
            [
                f"{len(quantized)} of {len(names)} matrices are quantized already, {quantized[0]} among them; "
                "serve this folder as it is, or give the original weights"
            ]
        )


def _check_range(checkpoint: Checkpoint, specs: list[WeightSpec]) -> None:
    reasons = [
        f"tensor {spec.name} has numbers beyond the range of {spec.dtype}; choose another dtype"
        for spec in specs
        if not _fits(checkpoint.tensor(spec.name), spec.dtype)
    ]
    if reasons:
        raise ModelLoadError(reasons)


def _fits(stored: Tensor, dtype: torch.dtype) -> bool:
    """Whether every finite number stays finite."""
    return stored.dtype == dtype or all(
        torch.equal(piece.isfinite(), piece.to(dtype).isfinite()) for piece in stored.flatten().split(_CHUNK_ELEMENTS)
    )
