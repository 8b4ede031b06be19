"""The container of NF4 weights: storage, concatenation, slices, refusals."""

import dataclasses

import pytest
import torch
from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.nf4 import NF4Weight, dequantize, quantize

SLICES = [(128, 64, 64), (1, 3, 5), (7,), (300, 1)]


def weights(rows: tuple[int, ...], in_features: int) -> list[NF4Weight]:
    torch.manual_seed(0)
    return [quantize(torch.randn(count, in_features) * (index + 1)) for index, count in enumerate(rows)]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (63, 65), (64, 64), (129, 128), (256, 704), (1024, 1024)], ids=str)
def test_storage_keeps_its_bound(shape: tuple[int, int]) -> None:
    weight = quantize(torch.randn(shape))
    count = shape[0] * shape[1]
    assert weight.num_elements == count
    assert weight.num_bytes <= -(-count // 2) + -(-count // 64) + 4 * -(-count // 16384) + 4
    storages = (weight.packed, weight.absmax, weight.nested_absmax, weight.offset)
    assert weight.num_bytes == sum(tensor.untyped_storage().nbytes() for tensor in storages)


@pytest.mark.parametrize("in_features", [64, 63, 704])
@pytest.mark.parametrize("rows", SLICES, ids=str)
def test_concatenation_keeps_every_slice(rows: tuple[int, ...], in_features: int) -> None:
    parts = weights(rows, in_features)
    fused = NF4Weight.concatenate(parts)
    assert fused.shape == (sum(rows), in_features)
    assert torch.equal(dequantize(fused), torch.cat([dequantize(part) for part in parts]))
    for index, part in enumerate(parts):
        view = fused.slice(index)
        assert view.packed.untyped_storage().data_ptr() == fused.packed.untyped_storage().data_ptr()
        for field in ("packed", "absmax", "nested_absmax", "offset"):
            assert torch.equal(getattr(view, field), getattr(part, field))
        assert (view.out_features, view.in_features) == (part.out_features, part.in_features)


def test_concatenating_different_widths_is_refused() -> None:
    with pytest.raises(KernelError, match=r"one in_features, got \[63, 64\]"):
        NF4Weight.concatenate(weights((2,), 63) + weights((2,), 64))
    with pytest.raises(KernelError, match="one in_features"):
        NF4Weight.concatenate([])


def test_what_does_not_fit_the_shape_is_named() -> None:
    weight = weights((7,), 64)[0]
    with pytest.raises(KernelError, match=r"packed must be contiguous torch.uint8 \[256\].*absmax must be .* \[8\]"):
        dataclasses.replace(weight, out_features=(8,))
    with pytest.raises(KernelError, match=r"offset must be contiguous torch.float32 \[1\], got torch.float64 \[1\]"):
        dataclasses.replace(weight, offset=weight.offset.double())


def test_shared_memory_and_devices() -> None:
    weight = weights((7,), 64)[0]
    expected = dequantize(weight)
    assert weight.share_memory().packed.is_shared()
    assert torch.equal(dequantize(weight.to("cpu")), expected)
    assert weight.to("meta").device.type == "meta"
