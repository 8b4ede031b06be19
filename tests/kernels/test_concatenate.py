"""Stacking by rows: a view where memory allows, else a copy, and the same numbers either way."""

import pytest
import torch
from lorasrv_kernels.concatenate import concatenate
from lorasrv_kernels.nf4 import NF4Weight, dequantize, quantize
from torch import Tensor


def shares_memory(result: Tensor, whole: Tensor) -> bool:
    return result.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


@pytest.mark.parametrize("shape", [(12,), (12, 5)], ids=str)
def test_neighbours_become_a_view(shape: tuple[int, ...]) -> None:
    whole = torch.randn(shape)
    result = concatenate([whole[2:3], whole[3:9], whole[9:9], whole[9:11]])
    assert torch.equal(result, whole[2:11])
    assert shares_memory(result, whole)
    assert result.is_contiguous()


WHOLE = torch.arange(24.0).view(12, 2)
APART = {
    "gap": [WHOLE[0:2], WHOLE[3:4]],
    "order": [WHOLE[2:4], WHOLE[0:2]],
    "overlap": [WHOLE[0:3], WHOLE[2:4]],
    "first has gaps": [WHOLE.flatten()[0:4:2], WHOLE.flatten()[2:4]],
    "second has gaps": [WHOLE.flatten()[0:2], WHOLE.flatten()[2:6:2]],
    "storages": [WHOLE[0:2], WHOLE.clone()[2:4]],
}


@pytest.mark.parametrize("tensors", APART.values(), ids=APART)
def test_all_others_are_copied(tensors: list[Tensor]) -> None:
    result = concatenate(tensors)
    assert torch.equal(result, torch.cat(tensors))
    assert not shares_memory(result, WHOLE)


def test_equal_bytes_of_another_dtype_are_no_neighbours() -> None:
    whole = torch.zeros(4)
    result = concatenate([whole[:2], whole[2:].view(torch.int32)])
    assert torch.equal(result, torch.zeros(4))
    assert not shares_memory(result, whole)


def test_slices_of_a_weight_are_put_together_without_a_copy() -> None:
    fused = NF4Weight.concatenate([quantize(torch.randn(rows, 64)) for rows in (4, 2, 300)])
    again = NF4Weight.concatenate([fused.slice(index) for index in range(3)])
    assert torch.equal(dequantize(again), dequantize(fused))
    for part in ("packed", "absmax", "nested_absmax", "offset"):
        assert shares_memory(getattr(again, part), getattr(fused, part)), part
