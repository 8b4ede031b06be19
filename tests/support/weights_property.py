"""What must hold of any bytes as a weights file: refused, or read exactly as the safetensors library reads them."""

import json
import struct
import tempfile
from functools import cache
from pathlib import Path

import torch
from lorasrv_adapters.errors import AdapterError
from lorasrv_adapters.weights import DEFAULT_LIMITS, DTYPES, WEIGHTS_NAME, read_weights
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

LONGEST_MESSAGE = 20_000
"""Twenty reasons of a name each; what a client is sent must not grow with the file."""


def pack(header: object, data: bytes = b"") -> bytes:
    """Build a file from a header given as an object or as bytes."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + data


def entry(start: int, stop: int, shape: list[object], **changes: object) -> dict[str, object]:
    """Build a float32 tensor's header entry."""
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]} | changes


_ONE = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
SEEDS = [
    save({"a.lora_A.weight": torch.ones(2, 3), "b": torch.zeros(4).half(), "c": torch.ones(1).bfloat16()}, {"k": "v"}),
    save({"empty": torch.empty(0, 4), "d": torch.ones(5)}),
    pack({}),
    pack({"__metadata__": {}, "a": entry(0, 4, [1])}, bytes(4)),
    pack({"a": entry(0, 2, [1], dtype="F16"), "b": entry(2, 10, [2])}, bytes(10)),
    pack({"a": entry(0, 8, [2, 1, 1])}, bytes(8)),
    pack({"a": entry(0, 0, [0, 1 << 40])}),
    pack({"a": entry(0, 4, [1.0])}, bytes(4)),
    pack({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, bytes(4)),
    pack(b'{"a":' + _ONE + b',"\\u0061":' + _ONE + b"}", bytes(4)),
    pack(b'{"\\ud800":' + _ONE + b"}", bytes(4)),
    pack(b'{"a":' + _ONE.replace(b"[0,", b"[-0,") + b"}", bytes(4)),
    pack(b'{"__metadata__":{"a":"1","a":"2"},"a":' + _ONE + b"}", bytes(4)),
    pack(b"\xef\xbb\xbf{}"),
    pack(b"  {}  "),
    pack('{"a":1}'.encode("utf-16")),
    pack(b"{}" + b"\0" * 6),
    pack(b"[" * 2000),
]
"""Files that are fine, files that are not, and files on which two JSON parsers may disagree."""


def check_weights_file(content: bytes) -> bool:
    """Check one file; returns whether it is accepted."""
    folder = Path(_folder().name)
    (folder / WEIGHTS_NAME).write_bytes(content)
    ours, again = _read(folder), _read(folder)
    if isinstance(ours, str):
        assert ours == again
        return False
    assert isinstance(again, dict)
    assert ours.keys() == again.keys()
    theirs = _library(content)
    assert theirs is not None, "read, though the library refuses it"
    assert ours.keys() == theirs.keys()
    for tensor_name, tensor in ours.items():
        assert _bits(tensor) == _bits(theirs[tensor_name]) == _bits(again[tensor_name])
    return True


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    # one for all files: making one takes longer than a check
    return tempfile.TemporaryDirectory()


def bounded(error: AdapterError) -> str:
    """Return the error's message, which must be text that can be sent and must not grow with the file."""
    message = str(error)
    assert 0 < len(message.encode()) < LONGEST_MESSAGE
    return message


def _read(folder: Path) -> dict[str, Tensor] | str:
    try:
        tensors = read_weights(folder)
    except AdapterError as error:
        return bounded(error)
    assert len(tensors) <= DEFAULT_LIMITS.num_tensors
    for tensor in tensors.values():
        assert tensor.dtype in DTYPES.values()
        assert tensor.ndim <= DEFAULT_LIMITS.num_dims
    return tensors


def _library(content: bytes) -> dict[str, Tensor] | None:
    try:
        return load(content)
    except (SafetensorError, KeyError, ValueError):
        return None


def _bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
