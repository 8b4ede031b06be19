"""The merged model's files: weights computed one at a time as they are written, and `config.json`.

Holds one matrix at a time, in whatever steps `fold` takes. Knows file layouts; copies nothing and renames nothing.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.nf4 import quantize

from lorasrv.errors import MergeError
from lorasrv.merge.base import StreamedBase
from lorasrv.merge.fold import Figures, Folded, fold, measure
from lorasrv.merge.result import ResultPlan, result_bias
from lorasrv.merge.update import UpdateSource
from lorasrv.model.adapted_linear import Weight
from lorasrv.model.checkpoint import INDEX_FILE, SINGLE_FILE
from lorasrv.model.quantized_writer import QuantizedFiles, WeightSpec, dtype_name
from lorasrv.model.safetensors_writer import SafetensorsLayout, SafetensorsWriter, StoredTensor
from lorasrv.model.tensors import EMBEDDING

Progress = Callable[[int, int], None]
"""Told after every tensor of how many parameters are done, and of how many there are."""


class MergedWeights:
    """The weights of the result, computed as they are asked for.

    Attributes:
        figures: what became of the updates of the weights computed so far.
    """

    def __init__(
        self,
        base: StreamedBase,
        source: UpdateSource,
        plan: ResultPlan,
        *,
        dtype: torch.dtype | None,
        in_nf4: bool,
        progress: Progress | None = None,
    ) -> None:
        """Computes nothing yet.

        Args:
            base: what is merged into.
            source: what is merged.
            plan: what becomes of them.
            dtype: of what is not quantized; None: as the base's tensors are.
            in_nf4: whether the linear layers are in 4 bits.
            progress: told how far it is.
        """
        self._base = base
        self._source = source
        self._progress = progress or (lambda *_: None)
        self.dtype = dtype or base.stored_dtype(EMBEDDING)
        self.specs = [
            WeightSpec(
                name=name,
                shape=shape,
                dtype=dtype or base.stored_dtype(name),
                quantized=in_nf4 and name in plan.quantizable,
            )
            for name, shape in plan.shapes.items()
        ]
        self.figures: list[Figures] = []

    def __iter__(self) -> Iterator[tuple[str, Weight]]:
        """Every weight by its name, in the plan's order.

        Raises:
            MergeError: some cannot be stored, which is known after the last.
        """
        self.figures.clear()
        reasons: list[str] = []
        done, total = 0, sum(math.prod(spec.shape) for spec in self.specs)
        for spec in self.specs:
            yield spec.name, self._weight(spec, reasons)
            done += math.prod(spec.shape)
            self._progress(done, total)
        if reasons:
            raise MergeError(reasons)

    def _weight(self, spec: WeightSpec, reasons: list[str]) -> Weight:
        if spec.name.endswith(".bias"):
            bias = result_bias(spec.name, self._base, self._source).to(spec.dtype)
            if not bool(bias.isfinite().all()):
                reasons.append(_beyond(spec))
            return bias
        module = spec.name.removesuffix(".weight")
        folded = fold(self._base, self._source, module, in_nf4=spec.quantized)
        weight = self._stored(spec, folded, reasons)
        figures = measure(module, folded, weight)
        if figures is not None:
            self.figures.append(figures)
        return weight

    def _stored(self, spec: WeightSpec, folded: Folded, reasons: list[str]) -> Weight:
        if spec.quantized:
            try:
                return quantize(folded.weight)
            except KernelError as error:
                raise MergeError([*reasons, f"tensor {spec.name}: {error}"]) from error
        weight = folded.weight.to(spec.dtype)
        if not bool(weight.isfinite().all()):
            reasons.append(_beyond(spec))
        return weight


class WideFiles:
    """A model in 16 or 32 bits: one file of weights, or several with their index, and `config.json`."""

    def __init__(
        self, specs: Sequence[WeightSpec], *, config: Mapping[str, Any], dtype: torch.dtype, shard_bytes: int
    ) -> None:
        """Lays the files out.

        Args:
            specs: of all weights.
            config: the content of `config.json`, but for the dtype.
            dtype: of activations.
            shard_bytes: the largest file of weights, though every file has one tensor at least.
        """
        shards = list(_shards(specs, shard_bytes))
        names = [SINGLE_FILE]
        if len(shards) > 1:
            names = [f"model-{place:05d}-of-{len(shards):05d}.safetensors" for place in range(1, len(shards) + 1)]
        self._layouts = {
            name: SafetensorsLayout([[tensor] for tensor in shard]) for name, shard in zip(names, shards, strict=True)
        }
        self._texts = {
            "config.json": _json({**config, "dtype" if "dtype" in config else "torch_dtype": dtype_name(dtype)})
        }
        if len(shards) > 1:
            self._texts[INDEX_FILE] = _json(_index(self._layouts))

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return self._weights_bytes + sum(map(len, self._texts.values()))

    @property
    def _weights_bytes(self) -> int:
        return sum(layout.num_bytes for layout in self._layouts.values())

    def write(self, folder: Path, weights: MergedWeights) -> int:
        """Writes the files into a folder that has none of them; returns the bytes of the weights.

        Raises:
            OSError: there is no room for them.
            MergeError: some weights cannot be stored.
        """
        places = {name: shard for shard, layout in self._layouts.items() for name in layout.tensors}
        with ExitStack() as stack:
            # all at once, so that a full disk shows before anything is computed
            files = {
                name: stack.enter_context(SafetensorsWriter(folder / name, layout))
                for name, layout in self._layouts.items()
            }
            for name, weight in weights:
                assert isinstance(weight, torch.Tensor)
                files[places[name]].write(name, weight)
                # before the next one is computed
                del weight
        for name, content in self._texts.items():
            (folder / name).write_text(content, encoding="utf-8")
        return self._weights_bytes


def new_files(weights: MergedWeights, plan: ResultPlan, *, shard_bytes: int) -> WideFiles | QuantizedFiles:
    """The files for weights; those in 4 bits are in one file, which servers map."""
    if any(spec.quantized for spec in weights.specs):
        return QuantizedFiles(weights.specs, config=plan.config, dtype=weights.dtype)
    return WideFiles(weights.specs, config=plan.config, dtype=weights.dtype, shard_bytes=shard_bytes)


def _shards(specs: Sequence[WeightSpec], shard_bytes: int) -> Iterator[list[StoredTensor]]:
    shard: list[StoredTensor] = []
    for spec in specs:
        tensor = StoredTensor(name=spec.name, dtype=spec.dtype, shape=spec.shape)
        if shard and sum(one.num_bytes for one in [*shard, tensor]) > shard_bytes:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _index(layouts: Mapping[str, SafetensorsLayout]) -> dict[str, object]:
    tensors = [tensor for layout in layouts.values() for tensor in layout.tensors.values()]
    return {
        "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors)},
        "weight_map": {name: shard for shard, layout in layouts.items() for name in layout.tensors},
    }


def _json(content: Mapping[str, object]) -> str:
    return json.dumps(content, indent=1) + "\n"


def _beyond(spec: WeightSpec) -> str:
    return f"tensor {spec.name} has numbers beyond the range of {dtype_name(spec.dtype)}; choose another dtype"
