"""The inputs of captured steps: rows that are left over do nothing, nothing of an earlier step stays, nothing moves."""

from collections.abc import Sequence

import pytest
import torch
from lorasrv.engine.decode_inputs import NO_PLACE, DecodeInputs
from lorasrv.engine.memory import DeviceMemory
from lorasrv.engine.request import Request, SamplingParams
from lorasrv.engine.sequence import ScheduledSequence
from lorasrv.engine.sequence import Sequence as LiveSequence
from lorasrv.engine.staged import StagedTensors
from lorasrv_kernels.attention import BLOCK_TOKENS
from lorasrv_kernels.batch import NO_ROW, NO_SLOT
from random_llama import TINY, random_adapter, random_llama

NUM_BLOCKS = 9


@pytest.fixture
def memory() -> DeviceMemory:
    """Room for three adapters of rank 4."""
    model = random_llama(TINY)
    return DeviceMemory(
        model.config,
        model.base,
        dtype=model.dtype,
        device="cpu",
        kv_bytes=NUM_BLOCKS * DeviceMemory.block_elements(model.config) * 4,
        adapter_bytes=3 * random_adapter(model, 4, seed=0).image.flat.nbytes,
        max_rank=4,
        max_adapters=3,
    )


def decoding(*, position: int, slot: int, blocks: Sequence[int]) -> ScheduledSequence:
    request = Request(request_id="", prompt_token_ids=(1,), sampling=SamplingParams(max_new_tokens=1))
    sequence = LiveSequence(request=request, number=0, token_ids=list(range(100, 101 + position)))
    sequence.block_table, sequence.slot = list(blocks), slot
    return ScheduledSequence(sequence=sequence, start=position, num_tokens=1, samples=True)


MANY = [
    decoding(position=70, slot=2, blocks=(1, 3, 5)),
    decoding(position=3, slot=-1, blocks=(2,)),
    decoding(position=31, slot=0, blocks=(4,)),
    decoding(position=32, slot=1, blocks=(6, 8)),
]


def entries(inputs: DecodeInputs) -> dict[int, list[int]]:
    """Rows by slot, as the tiles have them."""
    slots = inputs.batch(()).adapters.slots
    starts = slots.tile_starts.tolist()
    rows: dict[int, list[int]] = {}
    for tile, slot in enumerate(slots.tile_slots.tolist()):
        rows.setdefault(slot, []).extend(slots.rows[starts[tile] : starts[tile + 1]].tolist())
    return {slot: found for slot, found in rows.items() if slot >= 0 or found}


def test_rows_are_those_of_the_sequences(memory: DeviceMemory) -> None:
    inputs = DecodeInputs(4, num_positions=256, tile_tokens=8, memory=memory)
    inputs.write(MANY)
    batch = inputs.batch(())
    assert inputs.tokens.tolist() == [170, 103, 131, 132]
    assert batch.positions.tolist() == [70, 3, 31, 32]
    assert batch.attention.slot_mapping.tolist() == [
        5 * BLOCK_TOKENS + 6,
        2 * BLOCK_TOKENS + 3,
        4 * BLOCK_TOKENS + 31,
        8 * BLOCK_TOKENS,
    ]
    assert batch.attention.tiles.tolist() == [[0, 0, 1, 70], [1, 1, 1, 3], [2, 2, 1, 31], [3, 3, 1, 32]]
    assert batch.attention.block_tables[:, :3].tolist()[0] == [1, 3, 5]
    assert entries(inputs) == {0: [2], 1: [3], 2: [0]}
    assert batch.adapters.slots.base_rows.tolist() == [1, NO_ROW, NO_ROW, NO_ROW]


def test_left_over_rows_do_nothing(memory: DeviceMemory) -> None:
    inputs = DecodeInputs(4, num_positions=256, tile_tokens=8, memory=memory)
    inputs.write(MANY)
    inputs.write(MANY[3:])
    batch = inputs.batch(())
    assert inputs.tokens.tolist() == [132, 0, 0, 0]
    assert batch.attention.slot_mapping[0] == 8 * BLOCK_TOKENS
    assert batch.attention.slot_mapping[1:].tolist() == [NO_PLACE] * 3
    assert batch.attention.tiles.tolist() == [[0, 0, 1, 32], *[[0, 0, 0, 0]] * 3]
    assert entries(inputs) == {1: [0]}
    assert batch.adapters.slots.tile_slots.tolist() == [1, NO_SLOT, NO_SLOT, NO_SLOT]
    assert batch.adapters.slots.base_rows.tolist() == [NO_ROW] * 4


@pytest.mark.parametrize("exact", [True, False])
def test_exactness_reaches_the_kernels(memory: DeviceMemory, exact: bool) -> None:
    memory.exact = exact
    assert memory.adapters([0, -1]).slots.exact is exact
    assert DecodeInputs(2, num_positions=256, tile_tokens=8, memory=memory).batch(()).adapters.slots.exact is exact


def test_nothing_moves(memory: DeviceMemory) -> None:
    inputs = DecodeInputs(2, num_positions=256, tile_tokens=8, memory=memory)
    before = inputs.batch(range(3))
    inputs.write(MANY[:2])
    after = inputs.batch(range(3))
    for part in ("attention", "adapters"):
        left, right = getattr(before, part), getattr(after, part)
        for name in left.__slots__:
            if isinstance(tensor := getattr(left, name), torch.Tensor):
                assert tensor.data_ptr() == getattr(right, name).data_ptr()
    assert after.adapters.max_rank == 4


def test_staged_tensors_share_one_copy_and_keep_apart() -> None:
    staged = StagedTensors({"a": (torch.int32, (3,)), "b": (torch.int64, (2, 2))}, device=torch.device("cpu"))
    staged.host["a"].fill_(-1)
    assert staged.device["a"].tolist() == [0, 0, 0]
    staged.wait()
    staged.upload()
    assert staged.device["a"].tolist() == [-1, -1, -1]
    assert staged.device["b"].tolist() == [[0, 0], [0, 0]]
    # Triton makes other code for tensors that are not on 16 bytes
    assert staged.device["b"].data_ptr() % 16 == 0
