"""Which adapters the token rows of one batch use: built on the host once a step, shared by every layer.

Knows rows, slots and weights; knows nothing of adapters, models or where a slot's rank rows are stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

TILE_ROWS = 16
"""Token rows that one product takes at a time. Fixed, so that a row's result does not depend on how many there are."""

NO_SLOT = -1
"""The slot of a row that uses the plain base, and of a tile without rows."""

NO_ROW = -1
"""What stands in `base_rows` for no row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotBatch:
    """Token row -> list of (slot, weight), cut into tiles of rows that share a slot.

    Rows of the plain base have no entry and cost nothing. E entries are sorted by slot; K tiles cover them in order.

    Every tensor may be longer than its step needs, so that one captured CUDA graph serves many steps: the last tiles
    are of `NO_SLOT` and have no entries, `base_rows` may end in `NO_ROW`, and no tile reaches the last entries.
    """

    rows: Tensor  # [E] int64
    """Token row of each entry."""
    weights: Tensor  # [E] float32
    """Factor on the low-rank product of each entry; 1 unless adapters are composed."""
    tile_slots: Tensor  # [K] int32
    """Slot of each tile."""
    tile_starts: Tensor  # [K + 1] int32
    """First entry of each tile; a tile has at most `TILE_ROWS` entries."""
    base_rows: Tensor  # [T'] int64
    """The token rows without an entry, ascending."""
    composed: bool = False
    """Whether a row may have several entries."""
    exact: bool = True
    """Whether a row's bits must not depend on its neighbours, where giving that up is faster."""

    @classmethod
    def from_slots(cls, slots: Sequence[int], *, device: torch.device | str = "cpu", exact: bool = True) -> "SlotBatch":
        """One slot per token row with weight 1; `NO_SLOT` for the plain base."""
        entries = [[(slot, 1.0)] if slot != NO_SLOT else [] for slot in slots]
        return cls.from_entries(entries, device=device, exact=exact)

    @classmethod
    def from_entries(
        cls, entries: Sequence[Sequence[tuple[int, float]]], *, device: torch.device | str = "cpu", exact: bool = True
    ) -> "SlotBatch":
        """A list of (slot, weight) per token row."""
        flat = sorted(((slot, row, weight) for row, pairs in enumerate(entries) for slot, weight in pairs))
        tile_slots: list[int] = []
        tile_starts = [0]
        for slot, group in groupby(flat, key=itemgetter(0)):
            end = tile_starts[-1] + sum(1 for _ in group)
            while tile_starts[-1] < end:
                tile_slots.append(slot)
                tile_starts.append(min(tile_starts[-1] + TILE_ROWS, end))
        return cls(
            rows=torch.tensor([row for _, row, _ in flat], dtype=torch.int64, device=device),
            weights=torch.tensor([weight for _, _, weight in flat], dtype=torch.float32, device=device),
            tile_slots=torch.tensor(tile_slots, dtype=torch.int32, device=device),
            tile_starts=torch.tensor(tile_starts, dtype=torch.int32, device=device),
            base_rows=torch.tensor(
                [row for row, pairs in enumerate(entries) if not pairs], dtype=torch.int64, device=device
            ),
            composed=any(len(pairs) > 1 for pairs in entries),
            exact=exact,
        )

    @property
    def num_entries(self) -> int:
        """Entries over all rows, those that no tile reaches included; 0 when every row uses the plain base."""
        return len(self.rows)
