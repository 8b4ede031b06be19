"""The block allocator: a model-based test, and the faults it must notice."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from lorasrv.engine.kv_cache import BlockAllocator, num_blocks_for

NUM_BLOCKS = 12


class AllocatorMachine(RuleBasedStateMachine):
    """Compares the allocator with a set of free ids."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockAllocator(NUM_BLOCKS)
        self.free = set(range(NUM_BLOCKS))
        self.tables: list[list[int]] = []

    @rule(count=st.integers(0, 6))
    def allocate(self, count: int) -> None:
        block_ids = self.blocks.allocate(count)
        if count > len(self.free):
            assert block_ids is None
            return
        assert block_ids == sorted(self.free)[:count]
        self.free -= set(block_ids)
        self.tables.append(block_ids)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.blocks.free(table)
        self.free |= set(table)

    @precondition(lambda self: self.free)
    @rule(data=st.data())
    def free_what_is_free(self, data: st.DataObject) -> None:
        wrong = data.draw(st.sampled_from(sorted(self.free)))
        owned = [block_id for table in self.tables for block_id in table]
        with pytest.raises(ValueError, match=f"block {wrong} is not in use"):
            self.blocks.free([*owned, wrong])

    @invariant()
    def counts_agree(self) -> None:
        assert self.blocks.num_free == len(self.free)
        assert self.blocks.num_used == NUM_BLOCKS - len(self.free)
        self.blocks.check_integrity(self.tables)


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_freeing_a_block_twice_in_one_call_is_an_error() -> None:
    blocks = BlockAllocator(4)
    blocks.allocate(2)
    with pytest.raises(ValueError, match="block 1 is not in use"):
        blocks.free([1, 1])
    assert blocks.num_used == 2


@pytest.mark.parametrize("block_id", [-1, 4])
def test_freeing_an_unknown_block_is_an_error(block_id: int) -> None:
    with pytest.raises(ValueError, match="is not in use"):
        BlockAllocator(4).free([block_id])


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([[0, 1], [1, 2]], "block 1 has two owners"),
        ([[0, 1]], r"blocks \[2\] are in use without an owner"),
        ([[0, 1, 2, 3]], r"blocks \[3\] are in use without an owner, or owned but free"),
    ],
)
def test_integrity_check_names_the_blocks(tables: list[list[int]], message: str) -> None:
    blocks = BlockAllocator(4)
    blocks.allocate(3)
    with pytest.raises(RuntimeError, match=message):
        blocks.check_integrity(tables)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (32, 1), (33, 2), (64, 2)])
def test_num_blocks_for(num_tokens: int, num_blocks: int) -> None:
    assert num_blocks_for(num_tokens) == num_blocks
