"""Which KV blocks are free: bookkeeping of block ids, no memory.

Free blocks are one integer used as a bit set, which makes "lowest first", "how many below the limit" and "highest in
use" one operation each. This module knows no sequence, no tensor and no arena. Not thread-safe: engine thread only.
"""

from collections.abc import Callable, Iterable, Sequence

BLOCK_TOKENS = 32


def num_blocks_for(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` positions."""
    return -(-num_tokens // BLOCK_TOKENS)


class BlockAllocator:
    """Hands out block ids, lowest first, so that the used ones stay at one end of the arena.

    Args:
        num_blocks: ids are 0 to num_blocks - 1.
        limit: asked before blocks are handed out; ids from it on belong to someone else now. It may change between
            calls, but not fall to or below an id in use. None: all blocks are always available.
        num_guaranteed: what `limit` never falls below; a request that needs more is refused at once. None: num_blocks.
    """

    def __init__(
        self, num_blocks: int, *, limit: Callable[[], int] | None = None, num_guaranteed: int | None = None
    ) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, is {num_blocks}")
        self.num_blocks = num_blocks
        self.num_guaranteed = num_blocks if num_guaranteed is None else min(num_guaranteed, num_blocks)
        self._limit = limit
        self._all = (1 << num_blocks) - 1
        self._free = self._all

    @property
    def num_available(self) -> int:
        """Blocks below the limit, in use or not."""
        return self.num_blocks if self._limit is None else max(0, min(self._limit(), self.num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` would hand out now."""
        return (self._free & ((1 << self.num_available) - 1)).bit_count()

    @property
    def num_used(self) -> int:
        """Blocks in use."""
        return self.num_blocks - self._free.bit_count()

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Take the `num_blocks` lowest free ids, ascending; None, and nothing taken, if there are fewer."""
        if num_blocks > self.num_free:
            return None
        block_ids = []
        for _ in range(num_blocks):
            lowest = self._free & -self._free
            self._free ^= lowest
            block_ids.append(lowest.bit_length() - 1)
        return block_ids

    def free(self, block_ids: Iterable[int]) -> None:
        """Give blocks back.

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

    def highest_in_use(self) -> int:
        """The highest id in use, -1 if none is."""
        return (self._free ^ self._all).bit_length() - 1

    def check_integrity(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Check that the blocks in use are exactly those of `block_tables`, each in one place.

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
