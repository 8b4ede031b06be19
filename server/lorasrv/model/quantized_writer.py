"""Writes a model as a folder that transformers loads with bitsandbytes, and this server by memory map.

Knows bitsandbytes' storage format and the layout of a model folder; quantizes nothing itself.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from lorasrv_kernels.nf4 import NF4Weight
from lorasrv_kernels.nf4.codes import levels, nested_codes
from safetensors.torch import save_file
from torch import Tensor

from lorasrv.model.adapted_linear import Weight
from lorasrv.model.checkpoint import INDEX_FILE
from lorasrv.model.config import read_json
from lorasrv.model.decoder import DecoderModel
from lorasrv.model.prequantized import SETTINGS, STATE
from lorasrv.model.tensors import MODULES

_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def write_quantized(model: DecoderModel, *, source: Path, folder: Path, shard_bytes: int = 1 << 30) -> None:
    """Writes a model as it is held, complete or not at all.

    Args:
        model: its quantized layers are stored in 4 bits, the others in the model's dtype.
        source: the folder it was loaded from; `config.json` and the tokenizer come from there.
        folder: the new folder; its parent must exist.
        shard_bytes: size above which a new file is begun.

    Raises:
        FileExistsError: `folder` is there already.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; choose another folder or remove it")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _write_tensors(model, partial, shard_bytes)
        _write_config(model, source, partial)
        for name in _COPIED:
            if (source / name).exists():
                shutil.copyfile(source / name, partial / name)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_tensors(model: DecoderModel, folder: Path, shard_bytes: int) -> None:
    shards = list(_shards(model, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name, weight in shard:
            tensors |= stored_tensors(name, weight, dtype=model.dtype)
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
    index = {"metadata": {"total_size": model.num_bytes}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _shards(model: DecoderModel, shard_bytes: int) -> Iterator[list[tuple[str, Weight]]]:
    shard: list[tuple[str, Weight]] = []
    size = 0
    for name, weight in model.stored():
        num_bytes = weight.num_bytes if isinstance(weight, NF4Weight) else weight.nbytes
        if shard and size + num_bytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append((name, weight))
        size += num_bytes
    yield shard


def stored_tensors(name: str, weight: Weight, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors one weight is stored in, under their names in a checkpoint, on the CPU.

    Args:
        name: of the weight, ending in ".weight".
        weight: one matrix, not a fused one.
        dtype: what bitsandbytes is to dequantize to.
    """
    if not isinstance(weight, NF4Weight):
        return {name: weight.cpu()}
    cpu = torch.device("cpu")
    state = {
        **SETTINGS,
        "dtype": _dtype_name(dtype),
        "shape": list(weight.shape),
        "nested_offset": weight.offset.item(),
    }
    return {
        name: weight.packed.cpu().view(-1, 1),
        f"{name}.absmax": weight.absmax.cpu(),
        f"{name}.quant_map": levels(cpu).clone(),
        f"{name}.nested_absmax": weight.nested_absmax.cpu(),
        f"{name}.nested_quant_map": nested_codes(cpu).clone(),
        f"{name}.{STATE}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def _write_config(model: DecoderModel, source: Path, folder: Path) -> None:
    config = read_json(source / "config.json")
    dense = [
        name.removesuffix(".weight")
        for name, weight in model.stored()
        if name.removesuffix(".weight").endswith(MODULES) and not isinstance(weight, NF4Weight)
    ]
    config["dtype" if "dtype" in config else "torch_dtype"] = _dtype_name(model.dtype)
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": _dtype_name(model.dtype),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [*dense, "lm_head"] if dense else None,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
