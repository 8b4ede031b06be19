"""The arena's extents never overlap, never touch the KV blocks, and survive being pushed together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lorasrv.engine.arena import ALIGNMENT, Arena


def test_blocks_lie_in_front_and_extents_behind() -> None:
    arena = Arena(num_blocks=3, block_elements=50, extent_elements=100)
    assert arena.kv_elements == 150
    offset = arena.reserve(100)
    assert offset is not None
    assert offset >= 150
    assert offset + 100 <= arena.num_elements
    assert arena.reserve(1) is None


def test_unknown_extent_is_an_error() -> None:
    with pytest.raises(KeyError):
        Arena(num_blocks=1, block_elements=1, extent_elements=10).release(0)


def test_compacting_makes_one_gap() -> None:
    arena = Arena(num_blocks=0, block_elements=1, extent_elements=4 * ALIGNMENT)
    first, second, third, fourth = (arena.reserve(ALIGNMENT) for _ in range(4))
    assert first is not None
    assert third is not None
    arena.release(first)
    arena.release(third)
    assert arena.reserve(2 * ALIGNMENT) is None
    assert [(move.source, move.target) for move in arena.compact()] == [(second, first), (fourth, second)]
    assert arena.reserve(2 * ALIGNMENT) is not None


@given(st.lists(st.tuples(st.sampled_from(["reserve", "release", "compact"]), st.integers(0, 300)), max_size=60))
def test_extents_keep_their_contents(operations: list[tuple[str, int]]) -> None:
    arena = Arena(num_blocks=2, block_elements=40, extent_elements=1000)
    memory = [0] * arena.num_elements
    live: dict[int, tuple[int, int]] = {}  # offset -> (mark, size)
    mark = 0
    for operation, number in operations:
        if operation == "reserve" and number:
            offset = arena.reserve(number)
            if offset is None:
                continue
            assert offset % ALIGNMENT == 0
            mark += 1
            live[offset] = (mark, number)
            assert not any(memory[offset : offset + number])
            memory[offset : offset + number] = [mark] * number
        elif operation == "release" and live:
            offset = sorted(live)[number % len(live)]
            arena.release(offset)
            _, size = live.pop(offset)
            memory[offset : offset + size] = [0] * size
        elif operation == "compact":
            targets = {}
            for move in arena.compact():
                piece = memory[move.source : move.source + move.num_elements]
                memory[move.source : move.source + move.num_elements] = [0] * move.num_elements
                memory[move.target : move.target + move.num_elements] = piece
                targets[move.source] = move.target
            live = {targets.get(offset, offset): extent for offset, extent in live.items()}
    assert not any(memory[:80])
    for offset, (value, size) in live.items():
        assert memory[offset : offset + size] == [value] * size
