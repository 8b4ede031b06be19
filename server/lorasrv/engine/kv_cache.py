"""Which KV blocks are free: bookkeeping of block ids, no memory.

Free blocks are one integer used as a bit set, so that "the lowest" and "how many" are one operation each. This module
knows no sequence and no tensor. Not thread-safe: engine thread only.
"""

from collections.abc import Iterable, Sequence

BLOCK_TOKENS = 32


def num_blocks_for(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` positions."""
    return -(-num_tokens // BLOCK_TOKENS)


class BlockAllocator:
    """Hands out block ids from 0 to num_blocks - 1, lowest first."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, is {num_blocks}")
        self.num_blocks = num_blocks
        self._all = (1 << num_blocks) - 1
        self._free = self._all

    @property
    def num_free(self) -> int:
        """Blocks that nobody has."""
        return self._free.bit_count()

    @property
    def num_used(self) -> int:
        """Blocks that somebody has."""
        return self.num_blocks - self.num_free

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Takes the `num_blocks` lowest free ids, ascending; None, and nothing taken, if there are fewer."""
        if num_blocks > self.num_free:
            return None
        block_ids = []
        for _ in range(num_blocks):
            lowest = self._free & -self._free
            self._free ^= lowest
            block_ids.append(lowest.bit_length() - 1)
        return block_ids

    def free(self, block_ids: Iterable[int]) -> None:
        """Gives blocks back.

        Raises:
            ValueError: one is not in use, or is named twice; nothing is freed then.
        """
        freed = 0
        for block_id in block_ids:
            bit = 1 << block_id if 0 <= block_id < self.num_blocks else 0
            if not bit or (self._free | freed) & bit:
                raise ValueError(f"block {block_id} is not in use")
            freed |= bit
        self._free |= freed

    def check_integrity(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Checks that the blocks in use are exactly those of `block_tables`, each in one place.

        Raises:
            RuntimeError: they are not; says which blocks are lost, shared, or owned but free.
        """
        owned = 0
        for block_table in block_tables:
            for block_id in block_table:
                if owned & (1 << block_id):
                    raise RuntimeError(f"block {block_id} has two owners")
                owned |= 1 << block_id
        if wrong := owned ^ self._free ^ self._all:
            block_ids = [block_id for block_id in range(self.num_blocks) if wrong >> block_id & 1]
            raise RuntimeError(f"blocks {block_ids} are in use without an owner, or owned but free")
