"""Slots of every rank, some with a scale or a bias, and token rows that use them."""

from dataclasses import replace

import torch
from lorasrv_kernels.batch import NO_ROW, NO_SLOT, SlotBatch
from lorasrv_kernels.table import ABSENT, ABSENT_ROW, Column, floats_at

RANKS = [[8, 3], [0, 1], [64, 0], [16, 16], [128, 5]]  # slot -> rank per slice
WITH_D = [[True, False], [False, True], [False, False], [False, True], [True, True]]
WITH_BIAS = [[False, True], [True, False], [False, False], [True, True], [False, False]]


class Arena:
    """Numbers of all slots at aligned offsets with NaN between them, and the table that finds them.

    `in_features` is the height of A's rows; an embedding's A is stored transposed.
    """

    def __init__(
        self, in_features: int, out_features: list[int], dtype: torch.dtype, *, transposed_a: bool = False
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        self.data = torch.full((1_000_000,), torch.nan, dtype=dtype)
        self.table = torch.tensor(ABSENT_ROW).repeat(len(RANKS), len(out_features), 1)
        self.transposed_a = transposed_a
        self._next = 32
        for slot, ranks in enumerate(RANKS):
            for piece, (rank, width) in enumerate(zip(ranks, out_features, strict=False)):
                a = torch.randn(rank, in_features, generator=generator) * in_features**-0.5
                b_t = torch.randn(rank, width, generator=generator)
                entry = self.table[slot, piece]
                entry[Column.RANK] = rank
                entry[Column.A] = self._put((a.T if transposed_a else a).to(dtype))
                entry[Column.B_T] = self._put(b_t.to(dtype))
                if WITH_D[slot][piece]:
                    entry[Column.D] = self._put_floats(torch.rand(width, generator=generator) + 0.5)
                if WITH_BIAS[slot][piece]:
                    entry[Column.BIAS] = self._put_floats(torch.randn(width, generator=generator))

    def _place(self, num_elements: int) -> int:
        offset = self._next
        self._next += -(-num_elements // 32) * 32 + 32
        return offset

    def _put(self, values: torch.Tensor) -> int:
        offset = self._place(values.numel())
        self.data[offset : offset + values.numel()] = values.flatten()
        return offset

    def _put_floats(self, values: torch.Tensor) -> int:
        offset = self._place(values.numel() * 4 // self.data.element_size())
        floats_at(self.data, offset, len(values)).copy_(values)
        return offset

    def dense(
        self, slot: int, piece: int, in_features: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The update B A [O, I], d [O] and the bias [O], if any, of one slot and slice, in float64."""
        entry = self.table[slot, piece].tolist()
        rank, a_offset, b_offset = entry[Column.RANK], entry[Column.A], entry[Column.B_T]
        shape = (in_features, rank) if self.transposed_a else (rank, in_features)
        a = self.data[a_offset : a_offset + rank * in_features].view(shape).double()
        b_t = self.data[b_offset : b_offset + rank * width].view(rank, width).double()
        d = torch.ones(width, dtype=torch.float64)
        if entry[Column.D] != ABSENT:
            d = floats_at(self.data, entry[Column.D], width).double()
        bias = None
        if entry[Column.BIAS] != ABSENT:
            bias = floats_at(self.data, entry[Column.BIAS], width).double()
        return b_t.T @ (a.T if self.transposed_a else a), d, bias


def with_tail(batch: SlotBatch, *, num_rows: int) -> SlotBatch:
    """The same step in tensors that serve any step of `num_rows` rows; what no tile reaches is out of range."""

    def longer(tensor: torch.Tensor, size: int, value: float) -> torch.Tensor:
        return torch.cat([tensor, tensor.new_full((size - len(tensor),), value)])

    return replace(
        batch,
        rows=longer(batch.rows, num_rows, 1 << 40),
        weights=longer(batch.weights, num_rows, torch.nan),
        tile_slots=longer(batch.tile_slots, num_rows, NO_SLOT),
        tile_starts=longer(batch.tile_starts, num_rows + 1, int(batch.tile_starts[-1])),
        base_rows=longer(batch.base_rows, num_rows, NO_ROW),
    )


def popularity(kind: str, tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(2)
    slots = torch.arange(len(RANKS))
    choices = {
        "distinct": slots.repeat(tokens // len(RANKS) + 1)[:tokens],
        "uniform": torch.randint(NO_SLOT, len(RANKS), (tokens,), generator=generator),
        "zipf": torch.multinomial(1 / (slots + 1.0), tokens, replacement=True, generator=generator),
        "identical": torch.full((tokens,), 3),
        "skewed": torch.where(torch.rand(tokens, generator=generator) < 0.9, 0, 4),
        "base only": torch.full((tokens,), NO_SLOT),
    }
    return choices[kind].tolist()
