"""An adapter packed into one flat run of numbers, ready to be copied into the device's arena.

It knows the normal form and the arena's dtype; it knows no device and no adapter method.
Letters: M modules of the base, R rank, I in-features, O out-features, N elements.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasrv_adapters.errors import AdapterIncompatibleError
from lorasrv_adapters.normalize import NormalizedAdapter, NormalizedModule

ALIGN_ELEMENTS = 32
"""Every piece starts at a multiple of this many elements: 64 bytes in 16-bit arenas, 128 in 32-bit ones."""

ABSENT_ROW = (0, 0, -1, 0)
"""The table row of a module that the adapter leaves alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterImage:
    """One adapter as the kernels read it.

    Attributes:
        flat: [N], arena dtype, contiguous, on the host; the float32 scales `d` lie in it as raw bytes.
        table: [M, 4], int64: offset of A [R, I], offset of B^T [R, O], offset of d [O] (-1: none), rank R.
            Offsets are elements of the arena dtype from the image's start, multiples of `ALIGN_ELEMENTS`.
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


def pack_image(adapter: NormalizedAdapter, module_order: Sequence[str], dtype: torch.dtype) -> AdapterImage:
    """Pack an adapter into one image.

    Args:
        adapter: The adapter; each of its modules must appear in `module_order`.
        module_order: The base's module names; row i of the table belongs to name i.
        dtype: The arena's floating dtype.

    Raises:
        AdapterIncompatibleError: A value does not fit `dtype`; all such modules are listed.
    """
    unknown = adapter.modules.keys() - set(module_order)
    if unknown:
        raise ValueError(f"modules outside the base's order: {sorted(unknown)}")
    rows: list[tuple[int, int, int, int]] = []
    end = 0
    for name in module_order:
        row, end = _place(adapter.modules.get(name), end, dtype)
        rows.append(row)
    table = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), 4)
    flat = torch.zeros(end, dtype=dtype)
    overflowing = [
        name
        for name, row in zip(module_order, rows, strict=True)
        if name in adapter.modules and not _write(flat, row, adapter.modules[name])
    ]
    if overflowing:
        raise AdapterIncompatibleError([f"{name}: a value does not fit {dtype}" for name in overflowing])
    return AdapterImage(flat=flat, table=table)


def _place(module: NormalizedModule | None, start: int, dtype: torch.dtype) -> tuple[tuple[int, int, int, int], int]:
    if module is None or (module.rank == 0 and module.d is None):
        return ABSENT_ROW, start
    a = start
    b = _align(a + module.a.numel())
    end = _align(b + module.b.numel())
    if module.d is None:
        return (a, b, -1, module.rank), end
    return (a, b, end, module.rank), _align(end + module.d.numel() * torch.float32.itemsize // dtype.itemsize)


def _write(flat: Tensor, row: tuple[int, int, int, int], module: NormalizedModule) -> bool:
    """Copy one module's tensors to their places; False when a value overflows the arena's dtype."""
    a, b, d, rank = row
    if rank:
        flat[a : a + module.a.numel()].view(module.a.shape).copy_(module.a)
        flat[b : b + module.b.numel()].view(module.b.shape[::-1]).copy_(module.b.T)
    fits = bool(torch.isfinite(flat[a : b + module.b.numel()]).all()) if rank else True
    if d >= 0 and module.d is not None:
        scale_elements = module.d.numel() * torch.float32.itemsize // flat.dtype.itemsize
        flat[d : d + scale_elements].view(torch.float32).copy_(module.d)
    return fits


def _align(offset: int) -> int:
    return -(-offset // ALIGN_ELEMENTS) * ALIGN_ELEMENTS
