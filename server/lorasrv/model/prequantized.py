"""Linear layers as bitsandbytes stores them: NF4 with double quantization, read from a checkpoint.

The key list is that of `bitsandbytes.functional.QuantState.as_dict(packed=True)`. Which tensors of a checkpoint are
quantized is decided tensor by tensor. Knows the storage format; the arithmetic is in `lorasrv_kernels.nf4`.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from lorasrv_kernels.nf4 import NF4Weight
from lorasrv_kernels.nf4.codes import BLOCK_SIZE, NESTED_BLOCK_SIZE, levels, nested_codes

from lorasrv.model.checkpoint import Checkpoint

STATE = "quant_state.bitsandbytes__nf4"
SETTINGS: Mapping[str, Any] = {
    "quant_type": "nf4",
    "blocksize": BLOCK_SIZE,
    "nested_blocksize": NESTED_BLOCK_SIZE,
    "nested_dtype": "float32",
}
_FP4_STATE = "quant_state.bitsandbytes__fp4"
_INT8_PARTS = ("SCB", "weight_format")
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)
_MAX_STATE_BYTES = 1 << 16


def is_quantized(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the tensor is one that bitsandbytes quantized."""
    return bool(_stored_parts(checkpoint, name))


def check(checkpoint: Checkpoint, name: str, shape: tuple[int, int], reasons: list[str]) -> set[str]:
    """Names in `reasons` whatever keeps a quantized tensor from being served as [O, I] = `shape`.

    Returns:
        The names of all tensors it is stored in.
    """
    wrong = _check_parts(checkpoint, name, shape)
    reasons.extend(f"quantized tensor {name}: {reason}" for reason in wrong)
    return {name, *_stored_parts(checkpoint, name)}


def read(checkpoint: Checkpoint, name: str) -> NF4Weight:
    """A quantized tensor that passed `check`: a view of the mapped file, but for its offset."""
    state = _state(checkpoint, name)
    out_features, in_features = state["shape"]
    return NF4Weight(
        # FSDP checkpoints keep the packed bytes under a float dtype
        packed=checkpoint.stored_bytes(name),
        absmax=checkpoint.tensor(f"{name}.absmax").flatten(),
        nested_absmax=checkpoint.tensor(f"{name}.nested_absmax").flatten(),
        offset=torch.tensor([state["nested_offset"]], dtype=torch.float32),
        out_features=(out_features,),
        in_features=in_features,
    )


def _stored_parts(checkpoint: Checkpoint, name: str) -> set[str]:
    """Names of the tensors that accompany a quantized one."""
    parts = {f"{name}.{part}" for part in (*_PARTS, _FP4_STATE)} | _int8_parts(name)
    return parts & checkpoint.shapes.keys()


def _int8_parts(name: str) -> set[str]:
    return {f"{name.removesuffix('weight')}{part}" for part in _INT8_PARTS}


def _check_parts(checkpoint: Checkpoint, name: str, shape: tuple[int, int]) -> list[str]:
    if f"{name}.{_FP4_STATE}" in checkpoint.shapes:
        return ["quant_type fp4 is not served; quantize the original weights to NF4"]
    if _int8_parts(name) & checkpoint.shapes.keys():
        return ["int8 is not served; quantize the original weights to NF4"]
    missing = [part for part in ("", *(f".{part}" for part in _PARTS)) if name + part not in checkpoint.shapes]
    if missing == [".nested_absmax", ".nested_quant_map"]:
        return ["only double quantization is served; quantize the original weights again with it"]
    if missing:
        return [f"{name}{part} is missing" for part in missing]
    wrong = _check_state(_state(checkpoint, name), shape)
    blocks = math.ceil(math.prod(shape) / BLOCK_SIZE)
    expected = {
        "absmax": ("U8", blocks),
        "nested_absmax": ("F32", math.ceil(blocks / NESTED_BLOCK_SIZE)),
        "quant_map": ("F32", 16),
        "nested_quant_map": ("F32", 256),
    }
    for part, (dtype, length) in expected.items():
        found = checkpoint.dtypes[f"{name}.{part}"], math.prod(checkpoint.shapes[f"{name}.{part}"])
        if found != (dtype, length):
            wrong.append(f"{part} must be {dtype} [{length}], got {found[0]} [{found[1]}]")
    num_bytes = checkpoint.stored_bytes(name).nbytes
    if num_bytes != math.ceil(math.prod(shape) / 2):
        wrong.append(f"{list(shape)} takes {math.ceil(math.prod(shape) / 2)} bytes, got {num_bytes}")
    return wrong or _check_tables(checkpoint, name)


def _check_state(state: Mapping[str, Any], shape: tuple[int, int]) -> list[str]:
    wrong = [
        f"{key} must be {json.dumps(value)}, got {json.dumps(state.get(key))}"
        for key, value in SETTINGS.items()
        if state.get(key) != value
    ]
    if state.get("shape") != list(shape):
        wrong.append(f"shape must be {list(shape)}, got {json.dumps(state.get('shape'))}")
    offset = state.get("nested_offset")
    if not isinstance(offset, int | float) or not math.isfinite(offset):
        wrong.append(f"nested_offset must be a finite number, got {json.dumps(offset)}")
    return wrong


def _check_tables(checkpoint: Checkpoint, name: str) -> list[str]:
    """The tables are constants; files of other machines differ from ours in the last bit at most."""
    cpu = torch.device("cpu")
    tables = {"quant_map": levels(cpu), "nested_quant_map": nested_codes(cpu)}
    return [
        f"{part} is not the table of this format"
        for part, table in tables.items()
        if not torch.allclose(checkpoint.tensor(f"{name}.{part}").flatten(), table, rtol=1e-6, atol=1e-9)
    ]


def _state(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """The JSON object of the quantization's settings; empty when it cannot be read."""
    stored = checkpoint.stored_bytes(f"{name}.{STATE}")
    if checkpoint.dtypes[f"{name}.{STATE}"] != "U8" or len(stored) > _MAX_STATE_BYTES:
        return {}
    try:
        state = json.loads(bytes(stored.tolist()))
    except ValueError:
        return {}
    return state if isinstance(state, dict) else {}
