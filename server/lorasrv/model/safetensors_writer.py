"""A safetensors file written tensor by tensor, laid out for being mapped. Knows the file format; no model.

The format allows no gaps, so alignment is a matter of order: runs whose lengths are multiples of 64 bytes come first,
then those of 32, and so on. Every tensor thus begins at a multiple of its dtype's size, and every run whose length is
a multiple of 64 bytes begins at one, too.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

ALIGNMENT_BYTES = 64

_CHUNK_ELEMENTS = 1 << 18
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """What a header says of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


Run = Sequence[StoredTensor]
"""Tensors of one dtype that lie in a row in the file."""


class SafetensorsLayout:
    """Where every tensor of a file lies.

    Attributes:
        header: the bytes before the first tensor.
        starts: name -> place of its first byte in the file.
        tensors: name -> the tensor.
        num_bytes: of the whole file.
    """

    def __init__(self, runs: Iterable[Run]) -> None:
        """Orders the runs; names must differ."""
        ordered = sorted(runs, key=_alignment, reverse=True)
        self.tensors = {tensor.name: tensor for run in ordered for tensor in run}
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        for tensor in self.tensors.values():
            offsets[tensor.name], end = end, end + tensor.num_bytes
            span = [offsets[tensor.name], end]
            entries[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": span}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT_BYTES)
        self.header = struct.pack("<Q", len(text)) + text
        self.starts = {name: len(self.header) + offset for name, offset in offsets.items()}
        self.num_bytes = len(self.header) + end


class SafetensorsWriter:
    """A file under construction; all of its space is taken at once, so that a full disk shows at the start."""

    def __init__(self, path: Path, layout: SafetensorsLayout) -> None:
        """Creates the file.

        Raises:
            OSError: it exists, or there is no room.
        """
        self._layout = layout
        self._missing = set(layout.tensors)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.posix_fallocate(self._descriptor, 0, layout.num_bytes)
            self._write(memoryview(layout.header), 0)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
        if error is None and self._missing:
            raise ValueError(f"never written: {', '.join(sorted(self._missing))}")

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor, cast to its dtype piece by piece.

        Args:
            tensor: of the layout's shape; any dtype and device, may be a memory map.

        Raises:
            ValueError: it has another shape, or was written before.
            OSError: it cannot be written.
        """
        stored = self._layout.tensors[name]
        if tuple(tensor.shape) != stored.shape or name not in self._missing:
            raise ValueError(f"{name} is {list(stored.shape)}, to be written once; got {list(tensor.shape)}")
        start = self._layout.starts[name]
        for piece in tensor.detach().flatten().split(_CHUNK_ELEMENTS):
            cast = piece.to("cpu", stored.dtype)
            self._write(cast.view(torch.uint8).numpy().data, start)
            start += cast.nbytes
        self._missing.remove(name)

    def _write(self, content: memoryview, start: int) -> None:
        while content:
            count = os.pwrite(self._descriptor, content, start)
            content, start = content[count:], start + count


def _alignment(run: Run) -> int:
    """The largest power of two up to `ALIGNMENT_BYTES` that divides the length of a run."""
    return math.gcd(sum(tensor.num_bytes for tensor in run), ALIGNMENT_BYTES)
