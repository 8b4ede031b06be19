"""The native linear layers in every instruction set of this machine: values, bits, and when they do not serve."""

from collections.abc import Callable
from functools import partial
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

needs_library = pytest.mark.skipif(library.load() is None, reason="native library not built (make native)")
each_isa = pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_kind = pytest.mark.parametrize("kind", ["nf4", "dense"])


def storage(weight: NF4Weight) -> tuple[Any, ...]:
    return weight.packed, weight.absmax, weight.nested_absmax, weight.offset, weight.out_features


def layer(kind: str, rows: tuple[int, ...], in_features: int, dtype: torch.dtype, isa: Isa) -> tuple[Linear, Tensor]:
    """A native layer, and its weight [O, I] in `dtype`."""
    torch.manual_seed(0)
    quantized = NF4Weight.concatenate([quantize(torch.randn(count, in_features) * count) for count in rows])
    dense = dequantize(quantized, dtype=dtype)
    if kind == "nf4":
        return lambda x, out: nf4_native.linear_(x, *storage(quantized), out, isa=isa), dense
    return lambda x, out: dense_native.linear_(x, dense, out, isa=isa), dense


def run(linear: Linear, x: Tensor, out_features: int) -> Tensor:
    """The layer's result, in memory that held NaN, between two guards that must not be written."""
    memory = torch.full((x.shape[0] + 2, out_features), float("nan"), dtype=x.dtype)
    memory[[0, -1]] = 7
    assert linear(x, memory[1:-1])
    assert (memory[[0, -1]] == 7).all()
    return memory[1:-1]


@needs_library
@each_isa
@each_dtype
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
@each_isa
@each_dtype
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
@each_isa
@each_dtype
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
            assert nf4_native.linear_(x, *storage(weight), expected, isa=WIDEST)
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
    assert not nf4_native.linear_(x, *storage(weight), out)
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
