"""The native linear layers in every instruction set of this machine: values, bits, and when they do not serve."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lorasrv_kernels.cpu import library
from lorasrv_kernels.cpu.isa import Isa, force_isa, forced_isa, isa_in_use, widest_isa
from lorasrv_kernels.dense import dense_linear
from lorasrv_kernels.dense import native as dense_native
from lorasrv_kernels.dense import reference as dense_reference
from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.nf4 import NF4Weight, dequantize, nf4_linear, quantize
from lorasrv_kernels.nf4 import native as nf4_native
from lorasrv_kernels.nf4.calls import Nf4LinearInto
from torch import Tensor

Linear = Callable[[Tensor, Tensor], bool]
"""(x, out): what a native linear layer of some weight and instruction set answers."""

DTYPES = [torch.float32, torch.bfloat16]
# of the usual size of a result, |x| |w| / sqrt(I): results reach six times that; float32 rounds each of up to 4096 / 8
# partial sums of a lane to 2^-24, which adds up to a few 1e-7; bfloat16 rounds the result to 2^-8
TOLERANCE = {torch.float32: 6e-6, torch.bfloat16: 6 * 2**-8}
ROWS = [(1,), (7,), (33,), (100,), (96, 1, 35)]
TOKENS = (0, 1, 2, 4, 5, 6, 7, 8, 9, 15, 16, 17, 63, 256)
WIDEST = widest_isa()
ISAS = [] if WIDEST is None else [isa for isa in Isa if isa <= WIDEST]
VERSIONS = [(isa, dtype) for isa in ISAS for dtype in DTYPES]
if Isa.AVX512_BF16 in ISAS:
    VERSIONS.append((Isa.AMX_EMULATED, torch.bfloat16))

needs_library = pytest.mark.skipif(library.load() is None, reason="native library not built (make native)")
each_version = pytest.mark.parametrize(("isa", "dtype"), VERSIONS, ids=lambda part: getattr(part, "name", str(part)))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_kind = pytest.mark.parametrize("kind", ["nf4", "dense"])
needs_emulation = pytest.mark.skipif(Isa.AVX512_BF16 not in ISAS, reason="tiles in software take AVX-512-BF16")


def storage(weight: NF4Weight) -> tuple[Any, ...]:
    return weight.packed, weight.absmax, weight.nested_absmax, weight.offset, weight.out_features


def layer(kind: str, rows: tuple[int, ...], in_features: int, dtype: torch.dtype, isa: Isa) -> tuple[Linear, Tensor]:
    """A native layer, and its weight [O, I] in `dtype`."""
    torch.manual_seed(0)
    quantized = NF4Weight.concatenate([quantize(torch.randn(count, in_features) * count) for count in rows])
    dense = dequantize(quantized, dtype=dtype)
    if kind == "nf4":
        return lambda x, out: nf4_native.linear_(Nf4LinearInto(x, *storage(quantized), out), isa=isa), dense
    return lambda x, out: dense_native.linear_(x, dense, out, isa=isa), dense


def run(linear: Linear, x: Tensor, out_features: int) -> Tensor:
    """The layer's result, in memory that held NaN, between two guards that must not be written."""
    memory = torch.full((x.shape[0] + 2, out_features), float("nan"), dtype=x.dtype)
    memory[[0, -1]] = 7
    assert linear(x, memory[1:-1])
    assert (memory[[0, -1]] == 7).all()
    return memory[1:-1]


@needs_library
@each_version
@each_kind
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("in_features", [64, 192, 1088, 4096])
def test_values_and_bits(kind: str, in_features: int, dtype: torch.dtype, isa: Isa) -> None:
    """Every result is near the exact one, and a row alone has the bits it has among others."""
    for rows in ROWS:
        linear, weight = layer(kind, rows, in_features, dtype, isa)
        x = torch.randn(256, in_features).to(dtype)
        expected = x.double() @ weight.double().T
        usual = x.double().norm(dim=1).outer(weight.double().norm(dim=1)) / in_features**0.5
        together = run(linear, x, sum(rows))
        assert ((together.double() - expected).abs() <= TOLERANCE[dtype] * usual).all()
        for count in TOKENS:
            for start in {0, 3 % (257 - count), 256 - count}:
                part = run(linear, x[start : start + count], sum(rows))
                assert torch.equal(part, together[start : start + count]), (rows, count, start)


@needs_library
@each_version
@each_kind
def test_any_number_of_tokens(kind: str, dtype: torch.dtype, isa: Isa) -> None:
    linear, _ = layer(kind, (33,), 128, dtype, isa)
    x = torch.randn(256, 128).to(dtype)
    together = run(linear, x, 33)
    for count in range(1, 256):
        assert torch.equal(run(linear, x[256 - count :], 33), together[256 - count :]), count


def tile_sums(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in the order in which AMX tiles add; [T, O] float32."""
    sums = torch.zeros(len(x), len(weight))
    for start in range(0, x.shape[1], 32):
        chains = torch.zeros(2, *sums.shape)
        for k in range(start, start + 32):
            # in float64 a product is exact, and so is its sum with a float32 number of similar size
            chains[k % 2] = (x[:, k].double().outer(weight[:, k].double()) + chains[k % 2].double()).float()
        sums += chains[0] + chains[1]
    return sums


@needs_emulation
def test_the_emulation_adds_in_the_order_of_tiles() -> None:
    """Sums that would be zero are what rounding leaves, which every change of order changes."""
    torch.manual_seed(0)
    x, weight = torch.randn(37, 96).bfloat16(), torch.randn(50, 96).bfloat16()
    x, weight = torch.cat([x, x.roll(5, 1)], 1), torch.cat([weight, -weight.roll(5, 1)], 1)
    expected = tile_sums(x, weight).bfloat16()
    assert (expected != 0).float().mean() > 0.5
    actual = run(lambda x, out: dense_native.linear_(x, weight, out, isa=Isa.AMX_EMULATED), x, 50)
    assert torch.equal(actual, expected)


@needs_emulation
def test_tiles_take_subnormal_numbers_as_zero() -> None:
    x, weight = torch.full((3, 64), 2.0**-130).bfloat16(), torch.full((5, 64), 2.0**100).bfloat16()
    assert (run(lambda x, out: dense_native.linear_(x, weight, out, isa=Isa.AMX_EMULATED), x, 5) == 0).all()


@needs_emulation
def test_over_tiles_an_nf4_weight_gives_the_bits_of_the_same_weight_dequantized() -> None:
    x = torch.randn(21, 192).bfloat16()
    results = [run(layer(kind, (40, 9), 192, x.dtype, Isa.AMX_EMULATED)[0], x, 49) for kind in ("nf4", "dense")]
    assert torch.equal(*results)


@pytest.mark.skipif(Isa.AMX not in ISAS, reason="no AMX on this machine, or its system withholds it")
@each_kind
def test_tiles_give_the_bits_of_the_emulation(kind: str) -> None:
    x = torch.randn(70, 1088).bfloat16()
    results = [run(layer(kind, (100, 33), 1088, x.dtype, isa)[0], x, 133) for isa in (Isa.AMX, Isa.AMX_EMULATED)]
    assert torch.equal(*results)


def test_tiles_serve_only_where_the_processor_has_them() -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or "amx_bf16" in flags.read_text():
        pytest.skip("no list of the processor's features, or it has AMX")
    assert Isa.AMX not in ISAS


@needs_library
@each_version
@each_kind
def test_threads_change_no_bit(kind: str, dtype: torch.dtype, isa: Isa, num_threads: int) -> None:
    linear, _ = layer(kind, (192, 100, 33), 1088, dtype, isa)
    x = torch.randn(37, 1088).to(dtype)
    for count in (1, 2, 8, 37):
        first = run(linear, x[:count], 325)
        torch.set_num_threads(3 - num_threads)
        assert torch.equal(run(linear, x[:count], 325), first)
        torch.set_num_threads(num_threads)


@needs_library
@each_version
@each_kind
def test_a_neighbour_that_is_not_finite_changes_no_bit(kind: str, dtype: torch.dtype, isa: Isa) -> None:
    linear, _ = layer(kind, (50,), 128, dtype, isa)
    x = torch.randn(20, 128).to(dtype)
    expected = run(linear, x, 50)
    x[[3, 18]], x[[4, 19]] = float("nan"), float("inf")
    others = [row for row in range(20) if row not in (3, 4, 18, 19)]
    for count in (5, 20):
        kept = [row for row in others if row < count]
        assert torch.equal(run(linear, x[:count], 50)[kept], expected[kept])
    assert run(linear, x, 50)[[3, 18]].isnan().all()


@needs_library
@each_dtype
@each_kind
def test_what_the_ops_choose(kind: str, dtype: torch.dtype) -> None:
    """The op uses the widest instruction set for every number of tokens."""
    assert WIDEST is not None
    if WIDEST is Isa.PORTABLE:
        pytest.skip("this machine has no instruction set that serves by itself")
    torch.manual_seed(0)
    weight = quantize(torch.randn(40, 128))
    dense = dequantize(weight, dtype=dtype)
    for count in (1, 30):
        x = torch.randn(count, 128).to(dtype)
        expected = torch.empty(count, 40, dtype=dtype)
        if kind == "nf4":
            assert nf4_native.linear_(Nf4LinearInto(x, *storage(weight), expected), isa=WIDEST)
            assert torch.equal(nf4_linear(x, weight), expected)
        else:
            assert dense_native.linear_(x, dense, expected, isa=WIDEST)
            assert torch.equal(dense_linear(x, dense), expected)


@pytest.mark.parametrize(
    ("in_features", "dtype"), [(63, torch.float32), (100, torch.bfloat16), (64, torch.float16)], ids=str
)
def test_the_reference_serves_the_rest(in_features: int, dtype: torch.dtype) -> None:
    weight = quantize(torch.randn(5, in_features))
    x, out = torch.randn(3, in_features).to(dtype), torch.full((3, 5), 7, dtype=dtype)
    assert not nf4_native.linear_(Nf4LinearInto(x, *storage(weight), out))
    assert not dense_native.linear_(x, dequantize(weight, dtype=dtype), out)
    assert (out == 7).all()
    assert torch.isfinite(nf4_linear(x, weight)).all()


@pytest.mark.usefixtures("without_library")
def test_without_the_library_the_reference_serves() -> None:
    weight = torch.randn(24, 128)
    x, expected = torch.randn(19, 128), torch.empty(19, 24)
    dense_reference.linear_(x, weight, expected)
    assert isa_in_use() is None
    assert torch.equal(dense_linear(x, weight), expected)
    quantized = quantize(weight)
    dense_reference.linear_(x, dequantize(quantized), expected)
    assert torch.equal(nf4_linear(x, quantized), expected)


@needs_library
@pytest.mark.usefixtures("unforced_isa")
def test_an_instruction_set_can_be_forced() -> None:
    x, weight = torch.randn(3, 256), torch.randn(24, 256)
    for isa in ISAS:
        force_isa(isa.name.lower())
        assert (forced_isa(), isa_in_use()) == (isa, isa)
        expected = torch.empty(3, 24)
        assert dense_native.linear_(x, weight, expected, isa=isa)
        assert torch.equal(dense_linear(x, weight), expected)
    force_isa(None)
    assert (forced_isa(), isa_in_use()) == (None, WIDEST)
    with pytest.raises(KernelError, match=r"must be one of portable, .* on this machine, got 'avx1024'"):
        force_isa("avx1024")


@pytest.mark.usefixtures("unforced_isa")
def test_an_instruction_set_that_is_lacking_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasrv_kernels.cpu.isa.widest_isa", lambda: Isa.AVX2)
    with pytest.raises(KernelError, match=r"one of portable, avx2 on this machine, got 'avx512'"):
        force_isa("avx512")


@pytest.mark.usefixtures("unforced_isa")
def test_the_emulation_cannot_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasrv_kernels.cpu.isa.widest_isa", lambda: Isa.AMX)
    force_isa("amx")
    assert isa_in_use() is Isa.AMX
    with pytest.raises(KernelError, match=r"avx512_bf16, amx on this machine, got 'amx_emulated'"):
        force_isa("amx_emulated")


@pytest.mark.usefixtures("unforced_isa")
def test_portable_code_serves_only_where_it_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasrv_kernels.cpu.isa.widest_isa", lambda: Isa.PORTABLE)
    x, weight, out = torch.randn(3, 64), torch.randn(24, 64), torch.empty(3, 24)
    served = partial(dense_native.linear_, x, weight, out)
    assert not served()
    force_isa("portable")
    assert served() is (library.load() is not None)


def test_a_library_of_other_sources_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda: object())
    with pytest.warns(UserWarning, match="native CPU kernels lack lorasrv_missing.*make native"):
        assert library.function("lorasrv_missing", []) is None
