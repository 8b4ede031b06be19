"""Adapters resident on the device: which slot and which stretch of the arena each one has.

Least recently used idle adapters make room; one in use never goes. Where the room there is lies in pieces, the adapters
are pushed together, which only `acquire` does, and so never while a step reads them. It knows images and offsets, no
requests. Everything here runs on the engine thread, which alone owns the device; there is no lock. A step that was
launched before reads what was there before, because copies queue up behind it on the thread's own stream.
Letters: S slots, M modules of the base, N elements of the arena.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from lorasrv_kernels.table import ABSENT, ABSENT_ROW, OFFSETS
from torch import Tensor

from lorasrv_adapters.image import ALIGN_ELEMENTS, AdapterImage
from lorasrv_adapters.records import AdapterObserver, SilentObserver

_MAX_UNIONS = 256


class Extents(Protocol):
    """Bookkeeping of free stretches of the arena; it touches no memory."""

    @property
    def free_elements(self) -> int:
        """Elements that are free, in one stretch or several."""

    def reserve(self, num_elements: int) -> int | None:
        """Return the offset of a stretch, a multiple of 32 elements, or None where there is no room."""

    def release(self, offset: int) -> None:
        """Give back the stretch that starts at `offset`."""

    def compact(self) -> Sequence[tuple[int, int, int]]:
        """Make all that is free one stretch; return the (source, target, elements) to copy, in order."""


@dataclass(slots=True)
class _Resident:
    slot: int
    offset: int | None
    touched: frozenset[int]
    num_users: int


class AdapterSlots:
    """Residency of adapters in the device's arena.

    Args:
        arena: [N], the device memory shared with the KV cache; the caller keeps it alive.
        extents: Says which stretches of it are free.
        num_modules: M.
        max_adapters: S, the most adapters resident at once.
        observer: Told of evictions; None: nobody is.
    """

    def __init__(
        self,
        arena: Tensor,
        extents: Extents,
        num_modules: int,
        max_adapters: int,
        *,
        observer: AdapterObserver | None = None,
    ) -> None:
        self._arena = arena
        self._extents = extents
        self._observer = observer or SilentObserver()
        self._absent = torch.tensor(ABSENT_ROW, dtype=torch.int64).repeat(num_modules, 1)
        self._table = self._absent.repeat(max_adapters, 1, 1).to(arena.device)
        self._free_slots = list(reversed(range(max_adapters)))
        self._residents: OrderedDict[str, _Resident] = OrderedDict()
        self._unions: dict[frozenset[int], frozenset[int]] = {}

    @property
    def table(self) -> Tensor:
        """[S, M, 8], int64, on the arena's device: rows as in `AdapterImage.table`, with offsets into the arena.

        Always the same tensor, changed in place. The rows of a free slot are those of no adapter.
        """
        return self._table

    def touched(self, slots: Iterable[int]) -> frozenset[int]:
        """Return the modules, as places in the table, that the adapters in these slots change in any way."""
        wanted = frozenset(slots)
        union = self._unions.get(wanted)
        if union is None:
            touched = (resident.touched for resident in self._residents.values() if resident.slot in wanted)
            # the same few adapters decode together for many steps; more sets than that are not worth their memory
            self._unions = {} if len(self._unions) >= _MAX_UNIONS else self._unions
            union = self._unions[wanted] = frozenset().union(*touched)
        return union

    def acquire(self, digest: str, image: AdapterImage) -> int | None:
        """Count one more user of an adapter and return its slot, first copying it to the device if need be.

        Idle adapters are evicted for it, least recently used first, and only as many as it takes.

        Args:
            digest: What the image is known by.
            image: The image, in the arena's dtype; not kept.

        Returns:
            The slot, or None: what is in use leaves no slot or no stretch that is large enough.
        """
        resident = self._residents.get(digest)
        if resident is None:
            resident = self._admit(digest, image)
            if resident is None:
                return None
        resident.num_users += 1
        self._residents.move_to_end(digest)
        return resident.slot

    def release(self, slot: int) -> None:
        """Count one user less of the adapter in a slot; it stays resident until its room is needed."""
        resident = next((resident for resident in self._residents.values() if resident.slot == slot), None)
        if resident is None or resident.num_users == 0:
            raise ValueError(f"slot {slot} is not in use")
        resident.num_users -= 1

    def resident(self) -> Sequence[str]:
        """Return the digests on the device, least recently used first."""
        return tuple(self._residents)

    def drop(self, digest: str) -> bool:
        """Take an idle adapter off the device; False if it is in use or not there."""
        resident = self._residents.get(digest)
        if resident is None or resident.num_users:
            return False
        self._remove(digest)
        return True

    def _admit(self, digest: str, image: AdapterImage) -> _Resident | None:
        self._check(image)
        while not self._free_slots:
            if not self._evict_one():
                return None
        offset = None
        while image.num_elements and (offset := self._extents.reserve(image.num_elements)) is None:
            if self._extents.free_elements >= image.num_elements:
                self._compact()
            elif not self._evict_one():
                return None
        touched = frozenset((image.table != self._absent).any(1).nonzero().flatten().tolist())
        resident = self._residents[digest] = _Resident(self._free_slots.pop(), offset, touched, num_users=0)
        self._unions.clear()
        self._write(resident, image)
        return resident

    def _check(self, image: AdapterImage) -> None:
        if image.flat.dtype != self._arena.dtype:
            raise ValueError(f"the image has {image.flat.dtype} elements, the arena {self._arena.dtype}")
        if image.table.shape != self._absent.shape:
            raise ValueError(f"the image has {image.table.shape[0]} modules, the base {self._absent.shape[0]}")

    def _write(self, resident: _Resident, image: AdapterImage) -> None:
        rows = image.table
        if resident.offset is not None:
            if resident.offset % ALIGN_ELEMENTS:
                raise ValueError(f"offset {resident.offset} is not a multiple of {ALIGN_ELEMENTS} elements")
            self._arena[resident.offset : resident.offset + image.num_elements].copy_(image.flat, non_blocking=True)
            rows = _moved(image.table, resident.offset)
        self._table[resident.slot].copy_(rows)

    def _compact(self) -> None:
        residents = {resident.offset: resident for resident in self._residents.values()}
        for source, target, num_elements in self._extents.compact():
            # a copy in between, because the stretches may overlap
            self._arena[target : target + num_elements] = self._arena[source : source + num_elements].clone()
            resident = residents[source]
            resident.offset = target
            self._table[resident.slot].copy_(_moved(self._table[resident.slot], target - source))

    def _evict_one(self) -> bool:
        idle = next((digest for digest, resident in self._residents.items() if resident.num_users == 0), None)
        if idle is None:
            return False
        self._remove(idle)
        self._observer.adapter_evicted("device")
        return True

    def _remove(self, digest: str) -> None:
        resident = self._residents.pop(digest)
        self._unions.clear()
        if resident.offset is not None:
            self._extents.release(resident.offset)
        self._table[resident.slot].copy_(self._absent)
        self._free_slots.append(resident.slot)


def _moved(table: Tensor, offset: int) -> Tensor:
    """The same rows `offset` elements further on; what is absent stays absent."""
    moved = table.clone()
    moved[:, OFFSETS] += offset * (table[:, OFFSETS] != ABSENT)
    return moved
