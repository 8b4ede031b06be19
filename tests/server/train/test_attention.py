"""Attention by blocks: results and gradients are those of PyTorch's own, sequence by sequence."""

import pytest
import torch
from lorasrv.train import attention
from lorasrv.train.attention import attend_blockwise
from lorasrv.train.network import attend, rotate
from torch import Tensor

HEADS, KV_HEADS, SIZE = 6, 2, 16


def run(lengths: tuple[int, ...], window: int, dtype: torch.dtype, *, by_blocks: bool) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    rows = sum(lengths)
    heads = torch.randn(rows, HEADS + 2 * KV_HEADS, SIZE, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(rows, HEADS, SIZE, generator=generator).to(dtype)
    turns = torch.rand(rows, 1, SIZE // 2, generator=generator)
    angles = torch.cat([turns.cos(), turns.sin()], dim=-1)
    query, key, value = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    if by_blocks:
        attended = attend_blockwise(query, key, value, angles, lengths, window=window)
    else:
        attended = attend(rotate(query, angles), rotate(key, angles), value, lengths, window=window)
    return attended.detach(), *torch.autograd.grad(attended, heads, upstream)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("lengths", [(1,), (7, 19, 1, 12), (40,)], ids=str)
# one block, blocks that do not divide a sequence, and a row at a time
@pytest.mark.parametrize("limits", [(128, 1 << 21), (8, 1 << 21), (8, 1)], ids=str)
def test_as_by_the_library(
    lengths: tuple[int, ...], window: int, limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK_ROWS", limits[0])
    monkeypatch.setattr(attention, "BLOCK_ELEMENTS", limits[1])
    ours, expected = (run(lengths, window, torch.float32, by_blocks=by_blocks) for by_blocks in (True, False))
    for one, other in zip(ours, expected, strict=True):
        # float32 sums in another order
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_one_head_of_keys_that_lie_together_stays_as_it_is() -> None:
    heads = [torch.randn(9, count, SIZE) for count in (HEADS, 1, 1)]
    before = [part.clone() for part in heads]
    turns = torch.rand(9, 1, SIZE // 2)
    attend_blockwise(*heads, torch.cat([turns.cos(), turns.sin()], dim=-1), (9,), window=0)
    assert all(map(torch.equal, heads, before))


def test_rounds_little_more_than_the_library_in_bfloat16() -> None:
    exact = run((40, 90), 0, torch.float32, by_blocks=False)
    errors = [
        [float((one.float() - other).norm() / other.norm()) for one, other in zip(result, exact, strict=True)]
        for result in (run((40, 90), 0, torch.bfloat16, by_blocks=by_blocks) for by_blocks in (True, False))
    ]
    # scores and probabilities are rounded to 8 bits too
    assert all(own < 1.5 * library for own, library in zip(*errors, strict=True))
