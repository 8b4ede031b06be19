"""What the device reads is what was normalized, wherever it lies and whatever was there before."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lorasrv_adapters.base import BaseModule
from lorasrv_adapters.errors import AdapterIncompatibleError
from lorasrv_adapters.image import AdapterImage, pack_image
from lorasrv_adapters.normalize import NormalizedAdapter, NormalizedModule
from lorasrv_adapters.slots import AdapterSlots
from lorasrv_kernels.table import ABSENT_ROW
from torch import Tensor

SHAPES = {"first": (24, 16), "second": (7, 33), "third": (64, 5)}
BASE = SimpleNamespace(
    modules={name: BaseModule(kind="linear", out_features=o, in_features=i) for name, (o, i) in SHAPES.items()}
)


class ListExtents:
    """First fit over a list of taken stretches."""

    def __init__(self, num_elements: int) -> None:
        self.num_elements = num_elements
        self.taken: dict[int, int] = {}

    def reserve(self, num_elements: int) -> int | None:
        size, offset = -(-num_elements // 32) * 32, 0
        for start in sorted(self.taken):
            if start - offset >= size:
                break
            offset = start + self.taken[start]
        if offset + size > self.num_elements:
            return None
        self.taken[offset] = size
        return offset

    def release(self, offset: int) -> None:
        del self.taken[offset]

    @property
    def free_elements(self) -> int:
        return self.num_elements // 32 * 32 - sum(self.taken.values())

    def compact(self) -> list[tuple[int, int, int]]:
        moves, packed, end = [], {}, 0
        for offset in sorted(self.taken):
            packed[end] = self.taken[offset]
            if end != offset:
                moves.append((offset, end, self.taken[offset]))
            end += self.taken[offset]
        self.taken = packed
        return moves


def adapter(ranks: dict[str, int], *, dora: bool = False, seed: int = 0) -> NormalizedAdapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, rank in ranks.items():
        out_features, in_features = SHAPES[name]
        modules[name] = NormalizedModule(
            a=torch.randn(rank, in_features, generator=generator),
            b=torch.randn(out_features, rank, generator=generator),
            d=torch.rand(out_features, generator=generator) if dora else None,
        )
    return NormalizedAdapter(digest=f"{seed:064x}", kind="lora", base_model="", modules=modules)


def piece(memory: Tensor, offset: int, *shape: int) -> Tensor:
    """Read as a kernel does: by offset and shape alone."""
    return torch.as_strided(memory, shape, (shape[1], 1), offset)


def scales(memory: Tensor, offset: int, length: int) -> Tensor:
    return memory.view(torch.float32)[offset * memory.itemsize // 4 :][:length]


def assert_holds(memory: Tensor, table: Tensor, source: NormalizedAdapter) -> None:
    assert table.dtype == torch.int64
    for name, row in zip(SHAPES, table.tolist(), strict=True):
        module = source.modules.get(name)
        if module is None or (module.rank == 0 and module.d is None):
            assert row == list(ABSENT_ROW)
            continue
        a, b, d, rank, *_ = row
        assert rank == module.rank
        assert a % 32 == b % 32 == 0
        assert torch.equal(piece(memory, a, *module.a.shape), module.a.to(memory.dtype))
        assert torch.equal(piece(memory, b, *module.b.T.shape), module.b.T.to(memory.dtype))
        if module.d is None:
            assert d == -1
        else:
            assert d % 32 == 0
            assert torch.equal(scales(memory, d, len(module.d)), module.d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dora", [False, True])
def test_an_image_holds_every_module(dtype: torch.dtype, dora: bool) -> None:
    source = adapter({"first": 3, "second": 8}, dora=dora)
    image = pack_image(source, BASE, dtype)
    assert_holds(image.flat, image.table, source)
    assert image.num_elements % 32 == 0
    assert image.num_bytes == image.flat.nbytes + image.table.nbytes


def test_pieces_do_not_overlap() -> None:
    image = pack_image(adapter({"first": 1, "second": 2, "third": 3}, dora=True), BASE, torch.bfloat16)
    spans = []
    for (out_features, in_features), (a, b, d, rank, *_) in zip(SHAPES.values(), image.table.tolist(), strict=True):
        spans += [(a, a + rank * in_features), (b, b + rank * out_features), (d, d + 2 * out_features)]
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert spans[-1][1] <= image.num_elements


def test_modules_pruned_to_rank_0_take_no_room() -> None:
    image = pack_image(adapter({"first": 0, "third": 2}), BASE, torch.float32)
    assert image.table[0].tolist() == image.table[1].tolist() == list(ABSENT_ROW)
    assert image.num_elements == 32 + 128
    assert pack_image(adapter({"first": 0}), BASE, torch.float32).num_elements == 0


def test_values_beyond_the_arena_dtype_are_refused() -> None:
    source = adapter({"first": 1, "second": 1})
    source.modules["second"].b[0] = 1e6
    with pytest.raises(AdapterIncompatibleError, match=r"second: a value does not fit torch\.float16"):
        pack_image(source, BASE, torch.float16)
    pack_image(source, BASE, torch.bfloat16)


def test_modules_outside_the_order_are_an_error() -> None:
    with pytest.raises(ValueError, match="second"):
        pack_image(adapter({"first": 1, "second": 1}), SimpleNamespace(modules={}), torch.float32)


def new_slots(num_elements: int = 4096, max_adapters: int = 3, **options: object) -> tuple[AdapterSlots, Tensor]:
    arena = torch.full((num_elements,), float("nan"), dtype=torch.bfloat16)
    return AdapterSlots(arena, ListExtents(num_elements), len(SHAPES), max_adapters, **options), arena


def image_of(source: NormalizedAdapter) -> AdapterImage:
    return pack_image(source, BASE, torch.bfloat16)


def test_an_adapter_becomes_resident_once() -> None:
    slots, arena = new_slots()
    assert slots.table.tolist() == [[list(ABSENT_ROW)] * 3] * 3
    source = adapter({"first": 3, "second": 2}, dora=True)
    slot = slots.acquire("x", image_of(source))
    assert slot is not None
    assert_holds(arena, slots.table[slot], source)
    arena_before = arena.clone()
    assert slots.acquire("x", image_of(source)) == slot
    assert torch.equal(arena.view(torch.int16), arena_before.view(torch.int16))
    assert slots.resident() == ("x",)


def test_the_table_stays_the_same_tensor() -> None:
    slots, _ = new_slots()
    table = slots.table
    slot = slots.acquire("x", image_of(adapter({"first": 3})))
    assert table[slot, 0, 3] == 3
    slots.release(slot)
    assert slots.drop("x")
    assert table.tolist() == [[list(ABSENT_ROW)] * 3] * 3


def test_touched_modules_follow_the_adapter_of_a_slot() -> None:
    slots, _ = new_slots(max_adapters=2)
    assert slots.touched([0, 1]) == set()
    first = slots.acquire("x", image_of(adapter({"first": 3})))
    assert slots.touched([0, 1]) == {0}
    assert slots.touched([first, first, -1]) == {0}
    second = slots.acquire("y", image_of(adapter({"second": 2})))
    assert slots.touched([first, second]) == {0, 1}
    slots.release(first)
    assert slots.acquire("z", image_of(adapter({"third": 2}))) == first
    assert slots.touched([first, -1]) == {2}
    assert slots.touched([first, second]) == {1, 2}


def test_idle_adapters_go_least_recently_used_first(observer) -> None:
    slots, _ = new_slots(observer=observer)
    image = image_of(adapter({"first": 3}))
    for digest in "abc":
        slots.release(slots.acquire(digest, image))
    slots.release(slots.acquire("a", image))
    assert slots.resident() == ("b", "c", "a")
    slots.acquire("d", image)
    assert slots.resident() == ("c", "a", "d")
    assert observer.events == [("evicted", "device")]


def test_what_is_in_use_never_goes() -> None:
    slots, arena = new_slots(max_adapters=2)
    sources = {digest: adapter({"first": 3}, seed=ord(digest)) for digest in "abc"}
    held = {digest: slots.acquire(digest, image_of(sources[digest])) for digest in "ab"}
    slots.acquire("a", image_of(sources["a"]))
    assert slots.acquire("c", image_of(sources["c"])) is None
    slots.release(held["a"])
    assert slots.acquire("c", image_of(sources["c"])) is None
    assert not slots.drop("a")
    slots.release(held["a"])
    assert slots.acquire("c", image_of(sources["c"])) == held["a"]
    assert_holds(arena, slots.table[held["b"]], sources["b"])
    assert not slots.drop("a")


def test_room_is_made_only_as_far_as_needed() -> None:
    image = image_of(adapter({"first": 3}))
    slots, _ = new_slots(num_elements=3 * image.num_elements, max_adapters=8)
    for digest in "abc":
        slots.release(slots.acquire(digest, image))
    slots.acquire("d", image)
    assert slots.resident() == ("b", "c", "d")
    large = image_of(adapter({"first": 3, "third": 40}))
    assert large.num_elements > 3 * image.num_elements
    assert slots.acquire("large", large) is None
    assert "d" in slots.resident()


def test_room_in_pieces_is_pushed_together() -> None:
    sources = {digest: adapter({"first": 3, "third": 1}, dora=True, seed=ord(digest)) for digest in "abcd"}
    images = {digest: image_of(source) for digest, source in sources.items()}
    size = images["a"].num_elements
    slots, arena = new_slots(num_elements=4 * size, max_adapters=8)
    held = {digest: slots.acquire(digest, images[digest]) for digest in "abcd"}
    for digest in "ac":
        slots.release(held.pop(digest))
        assert slots.drop(digest)
    large = adapter({"first": 6, "third": 2}, dora=True)
    assert size < image_of(large).num_elements <= 2 * size
    slot = slots.acquire("large", image_of(large))
    assert_holds(arena, slots.table[slot], large)
    for digest, kept in held.items():
        assert_holds(arena, slots.table[kept], sources[digest])
    assert slots.table[held["b"]][1].tolist() == list(ABSENT_ROW)


def test_releasing_what_is_not_in_use_is_an_error() -> None:
    slots, _ = new_slots()
    slot = slots.acquire("x", image_of(adapter({"first": 3})))
    slots.release(slot)
    for wrong in (slot, 2 - slot, 99):
        with pytest.raises(ValueError, match="not in use"):
            slots.release(wrong)


def test_an_image_for_another_base_or_dtype_is_an_error() -> None:
    slots, _ = new_slots()
    with pytest.raises(ValueError, match=r"float32 elements"):
        slots.acquire("x", pack_image(adapter({"first": 3}), BASE, torch.float32))
    wider = SimpleNamespace(modules=BASE.modules | {"fourth": BASE.modules["first"]})
    with pytest.raises(ValueError, match="4 modules"):
        slots.acquire("x", pack_image(adapter({"first": 3}), wider, torch.bfloat16))
    assert slots.resident() == ()


def test_an_adapter_of_rank_0_everywhere_needs_a_slot_and_no_room() -> None:
    slots, _ = new_slots(num_elements=0)
    slot = slots.acquire("x", image_of(adapter({"first": 0})))
    assert slots.table[slot].tolist() == [list(ABSENT_ROW)] * 3
    slots.release(slot)
    assert slots.drop("x")


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["acquire", "release", "drop"]), st.integers(0, 5)), max_size=40))
def test_any_order_of_steps_keeps_what_is_held_intact(steps: list[tuple[str, int]]) -> None:
    sources = [adapter({"first": 1 + seed, "second": seed}, dora=seed % 2 == 1, seed=seed) for seed in range(6)]
    images = [image_of(source) for source in sources]
    slots, arena = new_slots(num_elements=1200, max_adapters=3)
    held: list[tuple[int, int]] = []
    for action, number in steps:
        if action == "acquire" and (slot := slots.acquire(str(number), images[number])) is not None:
            held.append((number, slot))
        elif action == "release" and held:
            slots.release(held.pop(number % len(held))[1])
        elif action == "drop":
            in_use = any(number == other for other, _ in held)
            assert slots.drop(str(number)) <= (not in_use)
        assert len({slot for _, slot in held}) == len({number for number, _ in held}) <= 3
        for number, slot in held:
            assert str(number) in slots.resident()
            assert_holds(arena, slots.table[slot], sources[number])
