"""How the device arena is divided: KV blocks from the front, adapters as movable extents from the back.

Bookkeeping over element counts; knows no tensor, no adapter and no sequence. Room for blocks and for extents is
set aside once, so that loading adapters never takes blocks from running requests, nor the reverse.
"""

from typing import NamedTuple

ALIGNMENT = 32
"""Elements. Every offset is a multiple, so that a row of any dtype starts on a cache line."""


class Move(NamedTuple):
    """Elements to copy, in the order given, when extents are pushed together; source and target may overlap."""

    source: int
    target: int
    num_elements: int


class Arena:
    """Offsets into one flat buffer.

    Args:
        num_blocks: KV blocks, laid out from offset 0.
        block_elements: elements of one KV block.
        extent_elements: elements set aside for extents, behind the blocks.
    """

    def __init__(self, *, num_blocks: int, block_elements: int, extent_elements: int) -> None:
        self.num_blocks = num_blocks
        self.block_elements = block_elements
        self._floor = _aligned(num_blocks * block_elements)
        self.num_elements = self._floor + _aligned(extent_elements)
        self._extents: dict[int, int] = {}

    @property
    def kv_elements(self) -> int:
        """Elements of all KV blocks, from offset 0."""
        return self.num_blocks * self.block_elements

    @property
    def extent_elements(self) -> int:
        """Elements set aside for extents."""
        return self.num_elements - self._floor

    @property
    def free_elements(self) -> int:
        """Elements for extents that no extent has, in one piece or several."""
        return self.extent_elements - sum(self._extents.values())

    def reserve(self, num_elements: int) -> int | None:
        """Takes the highest gap that fits. Returns its offset, or None if no single gap is large enough."""
        size = _aligned(num_elements)
        end = self.num_elements
        for offset in sorted(self._extents, reverse=True):
            if end - (offset + self._extents[offset]) >= size:
                break
            end = offset
        if end - size < self._floor:
            return None
        self._extents[end - size] = size
        return end - size

    def release(self, offset: int) -> None:
        """Gives an extent back.

        Raises:
            KeyError: no extent begins there.
        """
        del self._extents[offset]

    def compact(self) -> list[Move]:
        """Pushes all extents to the back, so that the free elements are one gap.

        Returns:
            What the owner of the buffer must copy, in this order, before anything else reads an extent.
        """
        moves = []
        end = self.num_elements
        packed: dict[int, int] = {}
        for offset in sorted(self._extents, reverse=True):
            size = self._extents[offset]
            end -= size
            packed[end] = size
            if end != offset:
                moves.append(Move(offset, end, size))
        self._extents = packed
        return moves


def _aligned(num_elements: int) -> int:
    return -(-max(num_elements, 1) // ALIGNMENT) * ALIGNMENT
