"""An adapter packed into one flat run of numbers, ready to be copied into the device's arena.

It knows the normal form, the kernels' table and the arena's dtype; it knows no device and no adapter method.
Letters: M modules of the base, R rank, I in-features, O out-features, N elements.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from lorasrv_kernels.table import ABSENT_ROW, Column, floats_at, ids_at, raw_elements
from torch import Tensor

from lorasrv_adapters.base import BaseModel, table_order
from lorasrv_adapters.errors import AdapterIncompatibleError

if TYPE_CHECKING:
    # so that resident adapters do not need what reading them needs
    from lorasrv_adapters.normalize import NormalizedAdapter, NormalizedModule

ALIGN_ELEMENTS = 32
"""Every piece starts at a multiple of this many elements: 64 bytes in 16-bit arenas, 128 in 32-bit ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterImage:
    """One adapter as the kernels read it.

    Attributes:
        flat: [N], arena dtype, contiguous, on the host; float32 and int32 pieces lie in it as raw bytes.
        table: [M, 8], int64: columns as in `lorasrv_kernels.table`. Offsets are elements of the arena dtype from the
            image's start, multiples of `ALIGN_ELEMENTS`.
    """

    flat: Tensor
    table: Tensor

    @property
    def num_elements(self) -> int:
        """Length of `flat`, in elements of the arena dtype."""
        return self.flat.numel()

    @property
    def num_bytes(self) -> int:
        """Bytes held by `flat` and `table`."""
        return self.flat.nbytes + self.table.nbytes

    def pinned(self) -> "AdapterImage":
        """The same image in page-locked memory, from which a GPU copies at full speed; needs CUDA.

        PyTorch keeps such memory in pieces of a power of two, so it may take up to twice the bytes.
        """
        return AdapterImage(flat=self.flat.pin_memory(), table=self.table)


def module_bytes(module: "NormalizedModule", dtype: torch.dtype) -> int:
    """Return the bytes that a module takes in an image of a dtype."""
    (_, num_elements) = _lay_out([_pieces(module, transposed_a=False)], dtype)
    return num_elements * dtype.itemsize


def pack_image(adapter: "NormalizedAdapter", base: BaseModel, dtype: torch.dtype) -> AdapterImage:
    """Pack an adapter into one image.

    Args:
        adapter: The adapter.
        base: The base it was normalized for; row i of the table belongs to the i-th name of `table_order`.
        dtype: The arena's floating dtype.

    Raises:
        AdapterIncompatibleError: A value does not fit `dtype`; all such modules are listed.
    """
    order = table_order(base)
    unknown = adapter.modules.keys() - set(order)
    if unknown:
        raise ValueError(f"modules outside the base's order: {sorted(unknown)}")
    pieces = {
        name: _pieces(module, transposed_a=base.modules[name].kind == "embedding")
        for name, module in adapter.modules.items()
    }
    table, end = _lay_out([pieces.get(name, {}) for name in order], dtype)
    for name, row in zip(order, table, strict=True):
        if name in adapter.modules:
            _count(row, adapter.modules[name])
    flat = torch.zeros(end, dtype=dtype)
    overflowing = [name for name, row in zip(order, table, strict=True) if not _write(flat, row, pieces.get(name, {}))]
    if overflowing:
        raise AdapterIncompatibleError([f"{name}: a value does not fit {dtype}" for name in overflowing])
    return AdapterImage(flat=flat, table=torch.tensor(table, dtype=torch.int64).reshape(len(order), len(Column)))


Pieces = Mapping[Column, Tensor]
"""The tensors of one module by the column of their offset."""

_RAW: Mapping[Column, Callable[[Tensor, int, int], Tensor]] = {
    Column.D: floats_at,
    Column.BIAS: floats_at,
    Column.ROW_IDS: ids_at,
}
"""Pieces that keep their own dtype."""


def _pieces(module: "NormalizedModule", *, transposed_a: bool) -> dict[Column, Tensor]:
    pieces: dict[Column, Tensor | None] = {
        Column.A: (module.a.T if transposed_a else module.a) if module.rank else None,
        Column.B_T: module.b.T if module.rank else None,
        Column.D: module.d,
        Column.BIAS: module.bias,
        Column.ROWS: None if module.rows is None else module.rows.values,
        Column.ROW_IDS: None if module.rows is None else module.rows.ids,
    }
    return {column: tensor for column, tensor in pieces.items() if tensor is not None}


def _lay_out(modules: list[dict[Column, Tensor]], dtype: torch.dtype) -> tuple[list[list[int]], int]:
    """The table without its counts, and the length of the whole."""
    table: list[list[int]] = []
    # a tied head brings the embedding's own tensor, which is kept once
    replaced: dict[int, int] = {}
    end = 0
    for pieces in modules:
        row: list[int] = list(ABSENT_ROW)
        for column, tensor in pieces.items():
            row[column] = replaced.setdefault(id(tensor), end) if column is Column.ROWS else end
            if row[column] != end:
                continue
            size = raw_elements(tensor.numel(), dtype.itemsize) if column in _RAW else tensor.numel()
            end = -(-(end + size) // ALIGN_ELEMENTS) * ALIGN_ELEMENTS
        table.append(row)
    return table, end


def _count(row: list[int], module: "NormalizedModule") -> None:
    row[Column.RANK] = module.rank
    row[Column.NUM_ROWS] = 0 if module.rows is None else len(module.rows.values)


def _write(flat: Tensor, row: list[int], pieces: Pieces) -> bool:
    """Copy one module's tensors to their places; False when a value overflows the arena's dtype."""
    fits = True
    for column, tensor in pieces.items():
        if column in _RAW:
            _RAW[column](flat, row[column], tensor.numel()).copy_(tensor)
            continue
        place = flat[row[column] : row[column] + tensor.numel()]
        place.view(tensor.shape).copy_(tensor)
        fits = fits and bool(torch.isfinite(place).all())
    return fits
