"""Causal attention with a gradient on a CPU, from the library's batched products; keeps its input alone.

PyTorch's own takes several times as long there, above all on the way back. Knows heads and sequences, no layer.
Letters: H query heads, K key and value heads, G = H / K, D head size; B query rows and C columns of a block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from lorasrv_kernels.rowwise import rotate_
from torch import Tensor
from torch.autograd import Function

BLOCK_ROWS = 128
BLOCK_ELEMENTS = 1 << 21
"""Most scores at a time, but for a single row of queries."""


def attend_blockwise(
    query: Tensor, key: Tensor, value: Tensor, angles: Tensor, lengths: Sequence[int], *, window: int
) -> Tensor:
    """Rotates queries and keys, and attends: every sequence to itself alone.

    Scores and probabilities have the dtype of the heads; sums over columns are float32 inside a product.

    Args:
        query: [T, H, D], all sequences one after the other, before the rotation.
        key, value: [T, K, D].
        angles: [T, 1, D] float32: cosines, then sines.
        lengths: of the sequences.
        window: how many positions a token sees, its own included; 0: all before it.

    Returns:
        [T, H, D].
    """
    result: Tensor = _Attention.apply(query, key, value, angles, tuple(lengths), window)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """Some queries of a sequence and the keys that any of them sees."""

    rows: slice
    columns: slice

    def mask(self, window: int, like: Tensor, groups: int) -> Tensor:
        """What is added to scores: [G B, C], 0 or minus infinity."""
        rows = torch.arange(self.rows.start, self.rows.stop)[:, None]
        distance = rows - torch.arange(self.columns.start, self.columns.stop)
        hidden = distance < 0
        if window:
            hidden |= distance >= window
        return torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, -torch.inf).repeat(groups, 1)


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, angles: Tensor, lengths: tuple[int, ...], window: int
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, angles)
        ctx.lengths, ctx.window = lengths, window
        heads = _Heads(query, key, value, angles, window=window)
        result = query.new_empty(query.shape)
        for block in _blocks(lengths, query.shape[1], window):
            heads.write(result, block, torch.bmm(heads.probabilities(block), heads.value[:, block.columns]))
        return result

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, angles = ctx.saved_tensors
        heads = _Heads(query, key, value, angles, window=ctx.window)
        (grad,) = upstream
        grad_query = torch.empty_like(query)
        # parts of several blocks are added up
        grad_key = torch.zeros(heads.key.shape)
        grad_value = torch.zeros_like(grad_key)
        for block in _blocks(ctx.lengths, query.shape[1], ctx.window):
            probabilities, columns, outer = heads.probabilities(block), block.columns, heads.rows(grad, block)
            grad_value[:, columns] += torch.bmm(probabilities.mT, outer)
            back = torch.bmm(outer, heads.value[:, columns].mT)
            back = torch.ops.aten._softmax_backward_data(back, probabilities, -1, back.dtype).mul_(heads.scale)
            heads.write(grad_query, block, torch.bmm(back, heads.key[:, columns]))
            grad_key[:, columns] += torch.bmm(back.mT, heads.rows(heads.query, block))
        gradients = [part.to(key.dtype).transpose(0, 1) for part in (grad_key, grad_value)]
        back_angles = torch.cat([angles[..., : angles.shape[-1] // 2], -angles[..., angles.shape[-1] // 2 :]], dim=-1)
        for part in (grad_query, gradients[0]):
            rotate_(part, back_angles)
        return grad_query, *gradients, None, None, None


class _Heads:
    """Rotated heads of a batch, keys and values head by head: [K, T, D]."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, angles: Tensor, *, window: int) -> None:
        # copies, for what is rotated in place must not be the caller's
        self.query = query.clone(memory_format=torch.contiguous_format)
        self.key = key.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        self.value = value.transpose(0, 1).contiguous()
        rotate_(self.query, angles)
        rotate_(self.key.transpose(0, 1), angles)
        self.scale = query.shape[2] ** -0.5
        self._window = window
        self._groups = query.shape[1] // key.shape[1]
        self._masks: dict[tuple[int, int], Tensor] = {}

    def probabilities(self, block: _Block) -> Tensor:
        """[K, G B, C]."""
        rows, columns = block.rows, block.columns
        place = (rows.start - columns.start, columns.stop - columns.start)
        if place not in self._masks:
            self._masks[place] = block.mask(self._window, self.query, self._groups)
        keys = self.key[:, columns].mT
        return torch.baddbmm(self._masks[place], self.rows(self.query, block), keys, alpha=self.scale).softmax(-1)

    def rows(self, heads: Tensor, block: _Block) -> Tensor:
        """Of [T, H, D]: [K, G B, D]."""
        return _grouped(heads[block.rows], self._groups).flatten(1, 2)

    def write(self, heads: Tensor, block: _Block, part: Tensor) -> None:
        """The inverse of `rows`."""
        _grouped(heads[block.rows], self._groups).copy_(part.unflatten(1, (self._groups, -1)))


def _grouped(rows: Tensor, groups: int) -> Tensor:
    """[B, H, D] as a view [K, G, B, D]."""
    return rows.view(len(rows), -1, groups, rows.shape[2]).permute(1, 2, 0, 3)


def _blocks(lengths: Sequence[int], num_heads: int, window: int) -> Iterator[_Block]:
    for start, stop in pairwise(accumulate(lengths, initial=0)):
        step = max(1, min(BLOCK_ROWS, BLOCK_ELEMENTS // (num_heads * max(1, stop - start))))
        for row in range(start, stop, step):
            last = min(row + step, stop)
            yield _Block(rows=slice(row, last), columns=slice(max(start, row - window + 1) if window else start, last))
