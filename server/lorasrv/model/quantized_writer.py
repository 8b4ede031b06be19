"""Writes a folder in NF4 that transformers loads with bitsandbytes, and this server by memory map.

In its one file, what the server computes as one product lies in a row, so that a mapped model is used in place. Knows
bitsandbytes' storage format and the layout of a model folder; quantizes nothing itself.
"""

import itertools
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lorasrv_kernels.nf4 import NF4Weight
from lorasrv_kernels.nf4.codes import BLOCK_SIZE, NESTED_BLOCK_SIZE, levels, nested_codes
from torch import Tensor

from lorasrv.model.adapted_linear import Weight
from lorasrv.model.checkpoint import SINGLE_FILE
from lorasrv.model.config import read_json
from lorasrv.model.decoder import DecoderModel
from lorasrv.model.new_folder import new_folder
from lorasrv.model.prequantized import SETTINGS, STATE
from lorasrv.model.safetensors_writer import Run, SafetensorsLayout, SafetensorsWriter, StoredTensor
from lorasrv.model.tensors import FUSED, MODULES

COPIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a model folder may hold beside weights and `config.json`."""

# more than any state takes; JSON allows spaces at the end
_STATE_BYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpec:
    """What a weight will be stored as: a matrix in 4 bits, or a tensor of any shape in `dtype`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of a quantized matrix, what bitsandbytes is to dequantize it to."""
    quantized: bool


def write_quantized(model: DecoderModel, *, source: Path, folder: Path) -> None:
    """Writes a model as it is held, complete or not at all.

    Args:
        model: its quantized layers are stored in 4 bits, the others in the model's dtype.
        source: the folder it was loaded from; `config.json` and the tokenizer come from there.
        folder: the new folder; its parent must exist.

    Raises:
        FileExistsError: `folder` is there already.
        DiskFullError: there is no room for it.
    """
    specs = [
        WeightSpec(name=name, shape=tuple(weight.shape), dtype=model.dtype, quantized=isinstance(weight, NF4Weight))
        for name, weight in model.stored()
    ]
    write_folder(folder, specs, model.stored(), source=source, dtype=model.dtype)


def write_folder(
    folder: Path,
    specs: Sequence[WeightSpec],
    weights: Iterable[tuple[str, Weight]],
    *,
    source: Path,
    dtype: torch.dtype,
) -> int:
    """Writes weights as they come, complete or not at all.

    Args:
        folder: the new folder; its parent must exist.
        specs: of all weights; those computed as one product must follow each other.
        weights: each of them once, by name; none is kept.
        source: where `config.json` and the tokenizer come from.
        dtype: of activations, for the new `config.json`.

    Returns:
        Bytes of the file with the weights.

    Raises:
        ModelLoadError: `source` has no `config.json`.
        FileExistsError: `folder` is there already, or being written.
        DiskFullError: there is no room for it.
    """
    files = QuantizedFiles(specs, config=read_json(source / "config.json"), dtype=dtype)
    copied = [source / name for name in COPIED_FILES if (source / name).exists()]
    needed_bytes = files.num_bytes + sum(path.stat().st_size for path in copied)
    with new_folder(folder, needed_bytes=needed_bytes) as partial:
        weights_bytes = files.write(partial, weights)
        for path in copied:
            shutil.copyfile(path, partial / path.name)
    return weights_bytes


class QuantizedFiles:
    """The two files of a model in NF4 that are not copied: its weights and its `config.json`."""

    def __init__(self, specs: Sequence[WeightSpec], *, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        """Lays the files out.

        Args:
            specs: of all weights; those computed as one product must follow each other.
            config: the content of a `config.json`; what it says of quantization is replaced.
            dtype: of activations, for the new `config.json`.
        """
        self._layout = SafetensorsLayout(_runs(specs))
        self._config = json.dumps(_config(config, specs, dtype), indent=1) + "\n"
        self._by_name = {spec.name: spec for spec in specs}

    @property
    def num_bytes(self) -> int:
        """Of both files."""
        return self._layout.num_bytes + len(self._config)

    def write(self, folder: Path, weights: Iterable[tuple[str, Weight]]) -> int:
        """Writes the files into a folder.

        Args:
            folder: has neither of them.
            weights: each of them once, by name; none is kept.

        Returns:
            Bytes of the file with the weights.

        Raises:
            OSError: there is no room for them.
        """
        with SafetensorsWriter(folder / SINGLE_FILE, self._layout) as file:
            for name, weight in weights:
                for part, tensor in _stored_tensors(name, weight, dtype=self._by_name[name].dtype).items():
                    file.write(part, tensor)
        (folder / "config.json").write_text(self._config, encoding="utf-8")
        return self._layout.num_bytes


def _runs(specs: Iterable[WeightSpec]) -> Iterator[Run]:
    for _, group in itertools.groupby(specs, key=_product):
        # one run per kind of part: all packed codes, all scales, ...
        yield from zip(*(_parts(spec) for spec in group), strict=True)


def _product(spec: WeightSpec) -> tuple[str, bool]:
    """Equal for weights that are computed as one."""
    for modules in FUSED:
        for module in modules:
            if spec.name.endswith(f".{module}.weight"):
                return spec.name.removesuffix(f"{module}.weight") + modules[0], spec.quantized
    return spec.name, spec.quantized


def _parts(spec: WeightSpec) -> list[StoredTensor]:
    if not spec.quantized:
        return [StoredTensor(name=spec.name, dtype=spec.dtype, shape=spec.shape)]
    num_elements = math.prod(spec.shape)
    num_blocks = math.ceil(num_elements / BLOCK_SIZE)
    parts: list[tuple[str, torch.dtype, tuple[int, ...]]] = [
        ("", torch.uint8, (math.ceil(num_elements / 2), 1)),
        (".absmax", torch.uint8, (num_blocks,)),
        (".quant_map", torch.float32, (16,)),
        (".nested_absmax", torch.float32, (math.ceil(num_blocks / NESTED_BLOCK_SIZE),)),
        (".nested_quant_map", torch.float32, (256,)),
        (f".{STATE}", torch.uint8, (_STATE_BYTES,)),
    ]
    return [StoredTensor(name=spec.name + part, dtype=dtype, shape=shape) for part, dtype, shape in parts]


def _stored_tensors(name: str, weight: Weight, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors one weight is stored in, under their names in a checkpoint."""
    if not isinstance(weight, NF4Weight):
        return {name: weight}
    cpu = torch.device("cpu")
    state = {
        **SETTINGS,
        "dtype": dtype_name(dtype),
        "shape": list(weight.shape),
        "nested_offset": weight.offset.item(),
    }
    return {
        name: weight.packed.view(-1, 1),
        f"{name}.absmax": weight.absmax,
        f"{name}.quant_map": levels(cpu),
        f"{name}.nested_absmax": weight.nested_absmax,
        f"{name}.nested_quant_map": nested_codes(cpu),
        f"{name}.{STATE}": torch.tensor(list(json.dumps(state).encode().ljust(_STATE_BYTES)), dtype=torch.uint8),
    }


def _config(source: Mapping[str, Any], specs: Iterable[WeightSpec], dtype: torch.dtype) -> dict[str, object]:
    config = dict(source)
    modules = [(spec.name.removesuffix(".weight"), spec.quantized) for spec in specs]
    dense = [module for module, quantized in modules if module.endswith(MODULES) and not quantized]
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype_name(dtype)
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype_name(dtype),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [*dense, "lm_head"] if dense else None,
    }
    return config


def dtype_name(dtype: torch.dtype) -> str:
    """As `config.json` spells it, e.g. "bfloat16"."""
    return str(dtype).removeprefix("torch.")
