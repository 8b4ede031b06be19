"""The safetensors files of a model folder, read through a memory map. Knows no model: names, shapes and tensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorasrv.errors import ModelLoadError
from lorasrv.model.config import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


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
        self._file_of: dict[str, Any] = {}
        self._files: list[Any] = []
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
        """A view into the mapped file: not copied, not writable, gone with the last reference to it."""
        result: Tensor = self._file_of[name].get_tensor(name)
        return result

    def close(self) -> None:
        """Lets go of the files; views that are still in use stay valid."""
        self._file_of.clear()
        self._files.clear()

    def _open(self, path: Path, reasons: list[str]) -> None:
        try:
            file: Any = safe_open(path, framework="pt", device="cpu")
        except (OSError, SafetensorError) as error:
            reasons.append(f"{path.name} cannot be read: {error}")
            return
        self._files.append(file)
        for name in file.keys():  # noqa: SIM118  not a mapping
            if name in self._file_of:
                reasons.append(f"tensor {name} is in two files, {path.name} is the second")
                continue
            view = file.get_slice(name)
            self._file_of[name] = file
            self.shapes[name] = tuple(view.get_shape())
            self.dtypes[name] = str(view.get_dtype())


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
