"""The specification of the trainable low-rank update and of its gradients, in plain PyTorch.

For the tokens t of a segment and the columns of a slice, with that segment's own A [R, I], B [O, R], d [O], scale s:

    out[t] = d * (y[t] + s * B (A x[t]))                      rounded once to the dtype of y

and with g = d * grad, u = A x, v = s * B^T g:

    grad_y = g        grad_x = A^T v        grad_A = sum_t v[t] x[t]^T        grad_B = s * sum_t g[t] u[t]^T
    grad_d = sum_t grad[t] * (y[t] + s * B u[t])

Everything is computed in float32 (float64 for float64 activations) and sums run over the tokens of one segment only.
`lora_update` is differentiable by PyTorch itself, which is how the gradients are tested.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]
"""Of y ([0, O] where nothing has a d: the incoming gradient is it), x, every A, every B and every d ([0] if absent)."""


class LoraUpdate(NamedTuple):
    """Arguments of `lora_update`; a, b, d and scales have an entry per segment and slice, slices side by side."""

    y: Tensor  # [T, O]
    x: Tensor  # [T, I]
    a: Sequence[Tensor]  # [R, I] each
    b: Sequence[Tensor]  # [O, R] each
    d: Sequence[Tensor]  # [O] each, or [0] if absent
    scales: Sequence[float]
    out_features: Sequence[int]
    segment_tokens: Sequence[int]


class LoraUpdateGrad(NamedTuple):
    """Arguments of `lora_update_grad`: the incoming gradient, and those of `lora_update`."""

    grad: Tensor  # [T, O]
    y: Tensor | None  # [T, O]; None only if nothing has a d
    x: Tensor
    a: Sequence[Tensor]
    b: Sequence[Tensor]
    d: Sequence[Tensor]
    scales: Sequence[float]
    out_features: Sequence[int]
    segment_tokens: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The part of the output that one pair of A and B adds to."""

    index: int
    """Of its A, B, d and scale."""
    rows: slice
    columns: slice


def pieces(segment_tokens: Sequence[int], out_features: Sequence[int]) -> Iterator[Piece]:
    """Every segment's slices, in the order of the lists."""
    index = 0
    for start, stop in pairwise(accumulate(segment_tokens, initial=0)):
        for first, last in pairwise(accumulate(out_features, initial=0)):
            yield Piece(index=index, rows=slice(start, stop), columns=slice(first, last))
            index += 1


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What activations of this dtype are added in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def any_d(d: Sequence[Tensor]) -> bool:
    """Whether any slice has a d; one without is [0]."""
    return any(len(own) > 0 for own in d)


def lora_update(call: LoraUpdate) -> Tensor:
    """See `lorasrv_kernels.lora.training.lora_update`."""
    y, x, a, b, d, scales, out_features, segment_tokens = call
    wide = sum_dtype(y.dtype)
    result = torch.zeros_like(y)
    for piece in pieces(segment_tokens, out_features):
        index = piece.index
        update = (x[piece.rows].to(wide) @ a[index].T) @ b[index].T
        part = y[piece.rows, piece.columns].to(wide) + scales[index] * update
        part = d[index] * part if len(d[index]) else part
        result[piece.rows, piece.columns] = part.to(y.dtype)
    return result


def lora_update_grad(call: LoraUpdateGrad) -> Gradients:
    """The gradients of `lora_update`; y may be None if no d is given."""
    grad, y, x, a, b, d, scales, out_features, segment_tokens = call
    wide = sum_dtype(x.dtype)
    grad_y = grad.clone(memory_format=torch.contiguous_format) if any_d(d) else grad.new_empty(0, grad.shape[1])
    grad_x = x.new_zeros(x.shape, dtype=wide)
    grad_a, grad_b, grad_d = list(a), list(b), [torch.empty_like(own) for own in d]
    for piece in pieces(segment_tokens, out_features):
        index, scale = piece.index, scales[piece.index]
        x_rows, g = x[piece.rows].to(wide), grad[piece.rows, piece.columns].to(wide)
        shrunk = x_rows @ a[index].T
        outer = shrunk.T @ g  # [R, O]
        own, factor = d[index], torch.full((1,), scale, dtype=wide, device=x.device)
        if len(own):
            assert y is not None, "the caller keeps y where a d is given"
            grad_d[index] = (g * y[piece.rows, piece.columns].to(wide)).sum(0) + scale * (b[index].T * outer).sum(0)
            g = own * g
            grad_y[piece.rows, piece.columns] = g.to(grad.dtype)
            factor = scale * own
        back = scale * (g @ b[index])  # [t, R]
        grad_a[index] = back.T @ x_rows
        grad_b[index] = (factor * outer).T.contiguous()
        grad_x[piece.rows] += back @ a[index]
    return grad_y, grad_x.to(x.dtype), grad_a, grad_b, grad_d
