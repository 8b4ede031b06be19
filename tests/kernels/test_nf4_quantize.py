"""Quantization against bitsandbytes: the same bytes, whatever the shape, dtype and values."""

from types import ModuleType
from typing import Any

import pytest
import torch
from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.nf4 import NF4Weight, dequantize, quantize
from lorasrv_kernels.nf4.codes import level_midpoints, levels, nested_codes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
SHAPES = [(1, 1), (1, 2), (3, 5), (1, 63), (1, 64), (1, 65), (7, 9), (64, 64), (100, 63), (33, 100), (128, 128),
          (300, 301), (256, 704), (129, 1023)]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def oracle(bitsandbytes: ModuleType, weight: Tensor) -> tuple[Tensor, Any]:
    return bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)


def assert_same_bytes(bitsandbytes: ModuleType, weight: Tensor, actual: NF4Weight) -> None:
    packed, state = oracle(bitsandbytes, weight)
    torch.testing.assert_close(actual.packed, packed.flatten(), rtol=0, atol=0)
    torch.testing.assert_close(actual.absmax, state.absmax, rtol=0, atol=0)
    torch.testing.assert_close(actual.nested_absmax, state.state2.absmax, rtol=0, atol=0)
    torch.testing.assert_close(actual.offset, state.offset.reshape(1), rtol=0, atol=0)


def test_code_tables_equal_bitsandbytes(bitsandbytes: ModuleType) -> None:
    assert torch.equal(nested_codes(CPU), bitsandbytes.create_dynamic_map())
    assert torch.equal(levels(CPU), bitsandbytes.get_4bit_type("nf4", "cpu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bytes(bitsandbytes: ModuleType, shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    first_block_zero, last_block_zero = weight.clone(), weight.clone()
    first_block_zero.view(-1)[:64] = 0
    last_block_zero.view(-1)[-(weight.numel() % 64 or 64) :] = 0
    for values in (weight, weight * 1e-4, first_block_zero, last_block_zero, weight * 0, torch.full(shape, 0.3)):
        assert_same_bytes(bitsandbytes, values.to(dtype), quantize(values.to(dtype)))


def test_threads_change_no_bit_of_a_large_matrix() -> None:
    """An adapter records its base's digest, so that a base must not depend on who quantizes it."""
    torch.manual_seed(0)
    weight = torch.randn(70_000, 64)
    threads_before = torch.get_num_threads()
    found = []
    for num_threads in (1, 2, 3, 4):
        torch.set_num_threads(num_threads)
        found.append(quantize(weight))
    torch.set_num_threads(threads_before)
    for other in found[1:]:
        assert torch.equal(other.offset, found[0].offset)
        assert torch.equal(other.nested_absmax, found[0].nested_absmax)
        assert torch.equal(other.absmax, found[0].absmax)
        assert torch.equal(other.packed, found[0].packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.37, 2.5, 1e-3])
def test_same_bytes_at_the_borders_of_levels(bitsandbytes: ModuleType, scale: float, dtype: torch.dtype) -> None:
    middle = level_midpoints(CPU)
    above, below = (torch.nextafter(middle, torch.tensor(toward)) for toward in (2.0, -2.0))
    values = torch.cat([middle, above, below, levels(CPU), torch.tensor([1.0, 1.0, -1.0])]) * scale
    weight = values.to(dtype).repeat(64).view(-1, 64)
    assert_same_bytes(bitsandbytes, weight, quantize(weight))


def test_same_bytes_at_the_borders_in_a_short_block(bitsandbytes: ModuleType) -> None:
    """A short last block is divided by its absmax, a full one multiplied by the reciprocal."""
    torch.manual_seed(0)
    values = torch.cat([level_midpoints(CPU), levels(CPU)])
    for scale in torch.rand(100) * 3:
        weight = (values * scale)[None]
        assert_same_bytes(bitsandbytes, weight, quantize(weight))


def test_same_bytes_for_scales_spread_over_many_decades(bitsandbytes: ModuleType) -> None:
    """Nested codes are found on a grid that is coarser than the codes near zero."""
    torch.manual_seed(1)
    absmax = 10 ** (torch.rand(4096, 1) * 9 - 9)
    weight = torch.rand(4096, 64) * absmax
    assert_same_bytes(bitsandbytes, weight, quantize(weight))


@pytest.mark.parametrize("chunk_rows", [1, 7, 64, 1000])
@pytest.mark.parametrize("shape", [(129, 96), (70, 63), (256, 128)], ids=str)
def test_chunks_change_nothing(shape: tuple[int, int], chunk_rows: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    whole, chunked = quantize(weight, chunk_rows=shape[0]), quantize(weight, chunk_rows=chunk_rows)
    assert torch.equal(whole.packed, chunked.packed)
    assert torch.equal(whole.absmax, chunked.absmax)


def test_rows_of_a_wider_matrix_and_a_transposed_one() -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 128)
    for view in (weight[:, 32:96], weight.T):
        assert torch.equal(quantize(view).packed, quantize(view.contiguous()).packed)


def test_temporaries_are_bounded_by_the_chunk() -> None:
    weight = torch.randn(1024, 512, dtype=torch.bfloat16)
    largest = 0

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.untyped_storage().data_ptr() != weight.data_ptr():
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    with Record():
        quantized = quantize(weight, chunk_rows=16)
    assert largest == quantized.packed.nbytes  # the result itself; a chunk in float32 is an eighth of it


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [0, 64])
def test_values_that_are_not_finite_are_refused(value: float, column: int) -> None:
    weight = torch.randn(1, 100)
    weight[0, column] = value
    with pytest.raises(KernelError, match="not finite"):
        quantize(weight)


@pytest.mark.parametrize("weight", [torch.zeros(4), torch.zeros(0, 4), torch.zeros(4, 4, dtype=torch.int32)])
def test_what_is_not_a_matrix_of_floats_is_refused(weight: Tensor) -> None:
    with pytest.raises(KernelError, match="non-empty floating"):
        quantize(weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantized_like_bitsandbytes(bitsandbytes: ModuleType, shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    packed, state = oracle(bitsandbytes, weight)
    expected = bitsandbytes.dequantize_4bit(packed, state).reshape(shape)  # transposes what fits in one byte
    assert torch.equal(dequantize(quantize(weight), dtype=dtype), expected)


def test_error_on_gaussian_weights() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1024, 1024)
    error = (dequantize(quantize(weight)) - weight).norm() / weight.norm()
    assert error == pytest.approx(0.092, abs=0.002)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantizing_again_changes_no_code(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    once = quantize(torch.randn(96, 128))
    assert torch.equal(quantize(dequantize(once, dtype=dtype)).packed, once.packed)
