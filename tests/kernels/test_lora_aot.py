"""What a launch of the Triton LoRA kernels compiles to for devices that are not there, at the shapes of real models."""

import pytest
import torch
from interpreter import INTERPRETING
from lorasrv_kernels.batch import SlotBatch
from lorasrv_kernels.table import Column

pytest.importorskip("triton")
if INTERPRETING:
    pytest.skip("compiles nothing", allow_module_level=True)

import aot
from lorasrv_kernels.lora import triton_kernels
from lorasrv_kernels.lora.reference import LoraApply, LoraEmbed

GROUPS = {
    # (I, widths of the slices)
    "1b-qkv": (2048, (2048, 512, 512)),
    "1b-down": (8192, (2048,)),
    "8b-qkv": (4096, (4096, 1024, 1024)),
    "8b-gate-up": (4096, (14336, 14336)),
    "8b-down": (14336, (4096,)),
    "8b-head": (4096, (128256,)),
}
pytestmark = pytest.mark.aot
FORBIDDEN = ("ATOM", "ATOMG", "RED", "REDG")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


def launches(
    monkeypatch: pytest.MonkeyPatch,
    in_features: int,
    out_features: tuple[int, ...],
    dtype: torch.dtype,
    *,
    batch: SlotBatch | None = None,
    bias: bool = False,
    max_rank: int = 128,
    exact: bool = True,
) -> list[aot.Launch]:
    """What one call launches; 33 rows of 32 slots and the base unless told otherwise."""
    batch = batch or SlotBatch.from_slots([*range(32), 0, -1], device="meta", exact=exact)
    rows = 34
    with torch.device("meta"):
        x, y = torch.empty(rows, in_features, dtype=dtype), torch.empty(rows, sum(out_features), dtype=dtype)
        arena = torch.empty(1 << 20, dtype=dtype)
        table = torch.empty(64, 113, len(Column), dtype=torch.int64)[:, 3 : 3 + len(out_features)]
        own = torch.empty(sum(out_features), dtype=dtype) if bias else None
    slots = (batch.rows, batch.weights, batch.tile_slots, batch.tile_starts, batch.base_rows)
    call = LoraApply(y, x, arena, table, out_features, *slots, own, max_rank, batch.composed, batch.exact)
    return aot.record(monkeypatch, lambda: triton_kernels.lora_apply_(call))


def check(launch: aot.Launch, capability: int) -> aot.Compiled:
    compiled = aot.compile_launch(launch, capability)
    compiled.check(capability)
    assert not any(f" {name}." in compiled.sass for name in FORBIDDEN)
    return compiled


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "inexact"])
@pytest.mark.parametrize("group", GROUPS)
def test_fits_a_device(group: str, exact: bool, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for launch in launches(monkeypatch, *GROUPS[group], torch.bfloat16, exact=exact):
        compiled = check(launch, capability)
        assert "HMMA" in compiled.sass
        # numbers of A and B^T come 16 bytes at a time
        assert "LDGSTS.E.BYPASS.128" in compiled.sass or "LDG.E.128" in compiled.sass
        if launch.name == "shrink":
            # those of a single row go straight to registers
            assert ("LDG.E.128" in compiled.sass) == (not exact)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_other_dtypes_fit_a_device(dtype: torch.dtype, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for launch in launches(monkeypatch, *GROUPS["8b-qkv"], dtype, bias=True):
        check(launch, capability)


@pytest.mark.parametrize("capability", [80, 90])
def test_odd_sizes_fit_a_device(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for launch in launches(monkeypatch, 2047, (2047, 511), torch.bfloat16, bias=True, max_rank=127):
        check(launch, capability)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "inexact"])
def test_embedding_fits_a_device(exact: bool, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = SlotBatch.from_slots([0, 1, -1], device="meta")
    slots = (batch.rows, batch.weights, batch.tile_slots, batch.tile_starts, batch.base_rows)
    with torch.device("meta"):
        y, arena = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((3, 4096), (1 << 20,)))
        tokens, table = torch.empty(3, dtype=torch.int64), torch.empty(64, len(Column), dtype=torch.int64)
    call = LoraEmbed(y, tokens, arena, table, *slots, False, exact)
    (launch,) = aot.record(monkeypatch, lambda: triton_kernels.lora_embed_(call))
    check(launch, capability)


def test_two_launches_whatever_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = set()
    for max_rank in (8, 128, 1024):
        recorded = launches(monkeypatch, *GROUPS["8b-qkv"], torch.bfloat16, max_rank=max_rank)
        assert [launch.name for launch in recorded] == ["shrink", "expand"]
        grids.add(tuple(launch.grid for launch in recorded))
    # 32 tiles and 8 planes of 512 features in 3 slices; 6144 columns in blocks of 128
    assert grids == {((32, 8, 3), (32, 48))}


def test_the_base_alone_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = SlotBatch.from_slots([-1] * 34, device="meta")
    assert launches(monkeypatch, *GROUPS["1b-qkv"], torch.bfloat16, batch=batch) == []
    recorded = launches(monkeypatch, *GROUPS["1b-qkv"], torch.bfloat16, batch=batch, bias=True)
    assert [(launch.name, launch.grid) for launch in recorded] == [("expand", (3, 24))]


def test_launches_follow_the_lengths_of_the_tensors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        longest = SlotBatch(
            rows=torch.empty(34, dtype=torch.int64),
            weights=torch.empty(34),
            tile_slots=torch.empty(34, dtype=torch.int32),
            tile_starts=torch.empty(35, dtype=torch.int32),
            base_rows=torch.empty(34, dtype=torch.int64),
            exact=False,
        )
    # on the meta device nothing can be read, so the grid knows no content
    recorded = launches(monkeypatch, *GROUPS["8b-down"], torch.bfloat16, batch=longest, bias=True)
    assert [launch.grid for launch in recorded] == [(34, 16, 1), (34 + 3, 32)]


def test_tiles_of_composed_rows_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = SlotBatch.from_entries([[(0, 0.5), (1, 0.5)], *([[(2, 1.0)]] * 33)], device="meta")
    _, expand = launches(monkeypatch, *GROUPS["1b-down"], torch.bfloat16, batch=batch)
    assert expand.grid == (1, 16)


def test_the_number_of_planes_follows_the_shape_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    planes = {}
    for name, group in GROUPS.items():
        batches = [SlotBatch.from_slots([0] * rows + [-1] * (34 - rows), device="meta") for rows in (1, 17, 34)]
        grids = [launches(monkeypatch, *group, torch.bfloat16, batch=batch)[0].grid for batch in batches]
        (planes[name],) = {grid[1] for grid in grids}
    assert planes == {"1b-qkv": 4, "1b-down": 16, "8b-qkv": 8, "8b-gate-up": 8, "8b-down": 16, "8b-head": 8}
