"""The safetensors files of a model folder, read through a memory map. Knows no model: names, shapes and tensors.

The map is read-only and shared: processes that open a folder use the same pages. Whoever replaces the files of a
folder in use must rename new ones into place; what is written into a mapped file shows in every tensor, and cutting it
short ends the process.
"""

import json
import mmap
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorasrv.errors import ModelLoadError
from lorasrv.model.config import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Checkpoint:
    """Open safetensors files, one or sharded. Close it, or use it as a context manager.

    Attributes:
        shapes: name -> shape of every tensor.
        dtypes: name -> dtype of every tensor, as safetensors names it, e.g. "BF16".
    """

    def __init__(self, folder: Path) -> None:
        """Opens the files and reads their headers.

        Raises:
            ModelLoadError: files are missing or damaged; lists everything.
        """
        reasons: list[str] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._bytes: dict[str, Tensor] = {}
        for path in _shard_paths(folder, reasons):
            self._open(path, reasons)
        if reasons:
            self.close()
            raise ModelLoadError(reasons)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def tensor(self, name: str) -> Tensor:
        """A tensor of one of the usual dtypes: a view into the mapped file, not to be written into.

        Where the file does not keep to the dtype's alignment, it is a copy.
        """
        dtype = _DTYPES[self.dtypes[name]]
        stored = self._bytes[name]
        aligned = stored if stored.storage_offset() % dtype.itemsize == 0 else stored.clone()
        return aligned.view(dtype).view(self.shapes[name])

    def stored_bytes(self, name: str) -> Tensor:
        """What a tensor of any dtype is stored in: [bytes] uint8, a view into the mapped file."""
        return self._bytes[name]

    def close(self) -> None:
        """Lets go of the files; views that are still in use stay valid, and keep their file mapped."""
        self._bytes.clear()

    def _open(self, path: Path, reasons: list[str]) -> None:
        try:
            # checks the header, and the file against it
            with safe_open(path, framework="pt", device="cpu"):
                header, data = _map(path)
        except (OSError, SafetensorError) as error:
            reasons.append(f"{path.name} cannot be read: {error}")
            return
        for name, entry in header.items():
            if name in self._bytes:
                reasons.append(f"tensor {name} is in two files, {path.name} is the second")
                continue
            start, stop = entry["data_offsets"]
            self._bytes[name] = data[start:stop]
            self.shapes[name] = tuple(entry["shape"])
            self.dtypes[name] = entry["dtype"]


def _map(path: Path) -> tuple[dict[str, Any], Tensor]:
    """The tensors of a file by name, and what its offsets count in: [bytes] uint8, mapped as long as views live."""
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    (header_bytes,) = struct.unpack_from("<Q", content)
    header: dict[str, Any] = json.loads(content[8 : 8 + header_bytes])
    header.pop("__metadata__", None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return header, torch.frombuffer(content, dtype=torch.uint8)[8 + header_bytes :]


def _shard_paths(folder: Path, reasons: list[str]) -> list[Path]:
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE]
    if (folder / INDEX_FILE).exists():
        return _indexed_paths(folder, reasons)
    pickles = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in folder.glob(pattern))
    found = (
        f"; {', '.join(pickles)} would run code when read, so save the model again as safetensors" if pickles else ""
    )
    reasons.append(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}{found}")
    return []


def _indexed_paths(folder: Path, reasons: list[str]) -> list[Path]:
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(isinstance(name, str) for name in weight_map.values()):
        reasons.append(f"{INDEX_FILE} must hold a weight_map of tensor names to file names")
        return []
    names = sorted(set(weight_map.values()))
    paths = []
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            reasons.append(f"{INDEX_FILE} names {json.dumps(name)}, which is no file of the folder")
        else:
            paths.append(folder / name)
    return paths
