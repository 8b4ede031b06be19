"""The native dequantization against the reference, bit for bit; and that nothing needs it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lorasrv_kernels.cpu import library
from lorasrv_kernels.cpu.isa import Isa, widest_isa
from lorasrv_kernels.nf4 import NF4Weight, dequantize, native, quantize, reference
from lorasrv_kernels.nf4.calls import Nf4Dequantize, Nf4DequantizeColumns

SHAPES = [((64,), 64), ((128, 64, 64), 128), ((1, 3, 5), 64), ((704, 704), 256), ((20,), 4096)]

needs_library = pytest.mark.skipif(library.load() is None, reason="native library not built (make native)")


def machine_isas() -> list[Isa]:
    widest = widest_isa()
    return [] if widest is None else [isa for isa in Isa if isa <= widest]


def storage(weight: NF4Weight) -> tuple[Any, ...]:
    return weight.packed, weight.absmax, weight.nested_absmax, weight.offset, weight.out_features, weight.in_features


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "in_features"), SHAPES, ids=str)
def test_bits_equal_the_reference(rows: tuple[int, ...], in_features: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = NF4Weight.concatenate([quantize(torch.randn(count, in_features) * count) for count in rows])
    count = sum(rows)
    for start, stop in {(0, count), (1, count - 1), (count // 2, count), (count, count)}:
        expected = torch.empty(stop - start, in_features, dtype=dtype)
        reference.dequantize_(Nf4Dequantize(*storage(weight), start, expected))
        for isa in machine_isas():
            actual = torch.full_like(expected, float("nan"))
            assert native.dequantize_(Nf4Dequantize(*storage(weight), start, actual), isa=isa)
            assert torch.equal(actual, expected)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "in_features"), SHAPES, ids=str)
def test_columns_have_the_bits_of_the_reference(
    rows: tuple[int, ...], in_features: int, dtype: torch.dtype, num_threads: int
) -> None:
    torch.manual_seed(num_threads)
    weight = NF4Weight.concatenate([quantize(torch.randn(count, in_features) * count) for count in rows])
    expected = torch.empty(sum(rows), in_features, dtype=dtype)
    reference.dequantize_(Nf4Dequantize(*storage(weight), 0, expected))
    assert native.dequantizes_columns(dtype)
    for start, stop in {(0, in_features), (0, 64), (in_features - 64, in_features)}:
        for isa in machine_isas():
            actual = torch.full((sum(rows), stop - start), torch.nan, dtype=dtype)
            native.dequantize_columns_(Nf4DequantizeColumns(*storage(weight), start, actual), isa=isa)
            assert torch.equal(actual, expected[:, start:stop])


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_that_are_extreme(dtype: torch.dtype) -> None:
    """Subnormal, huge and NaN scales: a prequantized file may hold any."""
    weight = quantize(torch.randn(8, 64 * 256))
    weight.nested_absmax.copy_(torch.tensor([1e-42, 1e-38, 3e38, float("inf"), float("nan"), 0.0, -1.0, 1.0]))
    expected = torch.empty(8, 64 * 256, dtype=dtype)
    reference.dequantize_(Nf4Dequantize(*storage(weight), 0, expected))
    for isa in machine_isas():
        actual = torch.empty_like(expected)
        assert native.dequantize_(Nf4Dequantize(*storage(weight), 0, actual), isa=isa)
        assert torch.equal(actual.nan_to_num(nan=12345.0), expected.nan_to_num(nan=12345.0))


@needs_library
def test_threads_change_no_bit(num_threads: int) -> None:
    torch.manual_seed(0)
    weight = quantize(torch.randn(512, 256))
    expected = torch.empty(512, 256)
    reference.dequantize_(Nf4Dequantize(*storage(weight), 0, expected))
    assert torch.equal(dequantize(weight), expected), num_threads


@needs_library
def test_one_openmp_runtime_is_loaded() -> None:
    library.load()
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    runtimes = {path for path in mapped if "omp" in Path(path).name and ".so" in Path(path).name}
    assert len(runtimes) == 1, runtimes


@pytest.mark.parametrize("in_features", [63, 100])
def test_rows_that_share_blocks_go_to_the_reference(in_features: int) -> None:
    weight = quantize(torch.randn(5, in_features))
    out = torch.full((5, in_features), 7.0)
    assert not native.dequantize_(Nf4Dequantize(*storage(weight), 0, out))
    assert (out == 7.0).all()


@pytest.mark.usefixtures("without_library")
def test_without_the_library_the_reference_serves() -> None:
    weight = quantize(torch.randn(8, 128))
    expected = torch.empty(8, 128)
    reference.dequantize_(Nf4Dequantize(*storage(weight), 0, expected))
    assert widest_isa() is None
    assert not native.dequantizes_columns(torch.float32)
    grad = torch.randn(3, 8)
    actual = torch.ops.lorasrv.nf4_linear_grad(grad, *storage(weight))
    torch.testing.assert_close(actual, grad @ expected)  # sums of 8 products in another order
    assert torch.equal(dequantize(weight), expected)


def test_a_library_that_cannot_be_loaded_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(library, "PATH", broken)
    library.load.cache_clear()
    with pytest.warns(UserWarning, match="native CPU kernels not loaded"):
        assert library.load() is None
    library.load.cache_clear()
