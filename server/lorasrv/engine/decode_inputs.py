"""What a decode step reads and no other step does: tokens, places and slots of its rows, always at the same addresses.

Rows beyond the sequences' own fill the batch up to its fixed size. They store no keys, attend to
nothing and use neither an adapter nor a bias. Knows rows, blocks and slots; knows no model.
"""

from collections.abc import Collection, Sequence

import torch
from lorasrv_kernels.attention import AttentionBatch, Span, split_blocks
from lorasrv_kernels.batch import NO_ROW, NO_SLOT, SlotBatch
from torch import Tensor

from lorasrv.engine.kv_cache import num_blocks_for
from lorasrv.engine.memory import DeviceMemory
from lorasrv.engine.sequence import ScheduledSequence
from lorasrv.engine.staged import StagedTensors
from lorasrv.model.batch import StepBatch

NO_PLACE = -1
"""What stands in the slot mapping for a row whose keys and values are not stored."""


class DecodeInputs:
    """The inputs of decode steps of up to B sequences, one token each.

    Args:
        num_rows: B; every step has so many rows.
        num_positions: the most positions a sequence can have.
        tile_tokens: most rows of a query tile, as in every other step of the model.
        memory: where cache and adapters are.
    """

    def __init__(self, num_rows: int, *, num_positions: int, tile_tokens: int, memory: DeviceMemory) -> None:
        self.num_rows = num_rows
        self._tile_tokens = tile_tokens
        self._split_blocks = split_blocks(num_positions)
        self._memory = memory
        int32, int64 = torch.int32, torch.int64
        self._staged = StagedTensors(
            {
                "tokens": (int64, (num_rows,)),
                "positions": (int64, (num_rows,)),
                "slot_mapping": (int64, (num_rows,)),
                "rows": (int64, (num_rows,)),
                "tile_slots": (int32, (num_rows,)),
                "tile_starts": (int32, (num_rows + 1,)),
                "base_rows": (int64, (num_rows,)),
                "tiles": (int32, (num_rows, 4)),
                "block_tables": (int32, (num_rows, num_blocks_for(num_positions))),
            },
            device=memory.arena.device,
        )
        self._weights = torch.ones(num_rows, device=memory.arena.device)
        self.write([])

    @property
    def tokens(self) -> Tensor:
        """[B] int64."""
        return self._staged.device["tokens"]

    def batch(self, touched: Collection[int]) -> StepBatch:
        """Describes the B rows; the same tensors every time.

        Args:
            touched: modules whose adapters are applied, as places in the model's order.
        """
        device = self._staged.device
        return StepBatch(
            positions=device["positions"],
            attention=AttentionBatch(
                slot_mapping=device["slot_mapping"],
                block_tables=device["block_tables"],
                tiles=device["tiles"],
                tile_tokens=self._tile_tokens,
                split_blocks=self._split_blocks,
            ),
            adapters=self._memory.adapter_batch(
                SlotBatch(
                    rows=device["rows"],
                    weights=self._weights,
                    tile_slots=device["tile_slots"],
                    tile_starts=device["tile_starts"],
                    base_rows=device["base_rows"],
                    exact=self._memory.exact,
                ),
                touched,
            ),
            kv_cache=self._memory.kv_cache,
        )

    def write(self, parts: Sequence[ScheduledSequence]) -> None:
        """Takes the tokens of the next step: one per sequence, at most B; row i belongs to parts[i]."""
        self._staged.wait()
        host, count = self._staged.host, len(parts)
        host["tokens"].copy_(self._filled([part.sequence.token_ids[part.start] for part in parts]))
        host["positions"].copy_(self._filled([part.start for part in parts]))
        self._write_slots([part.sequence.slot for part in parts])
        attention = AttentionBatch.from_spans(
            [Span(start=part.start, num_tokens=1, block_table=part.sequence.block_table) for part in parts],
            tile_tokens=self._tile_tokens,
        )
        host["slot_mapping"][:count] = attention.slot_mapping
        host["slot_mapping"][count:] = NO_PLACE
        host["tiles"][:count] = attention.tiles
        # tiles of no tokens
        host["tiles"][count:] = 0
        host["block_tables"][:count, : attention.block_tables.shape[1]] = attention.block_tables
        self._staged.upload()

    def _write_slots(self, slots: Sequence[int]) -> None:
        batch, host = SlotBatch.from_slots(slots), self._staged.host
        num_entries, num_tiles, num_base_rows = (len(part) for part in (batch.rows, batch.tile_slots, batch.base_rows))
        host["rows"][:num_entries] = batch.rows
        host["tile_slots"][:num_tiles] = batch.tile_slots
        host["tile_slots"][num_tiles:] = NO_SLOT
        host["tile_starts"][: num_tiles + 1] = batch.tile_starts
        host["tile_starts"][num_tiles + 1 :] = num_entries
        host["base_rows"][:num_base_rows] = batch.base_rows
        host["base_rows"][num_base_rows:] = NO_ROW

    def _filled(self, values: list[int]) -> Tensor:
        return torch.tensor(values + [0] * (self.num_rows - len(values)))
