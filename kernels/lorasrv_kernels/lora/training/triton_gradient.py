"""The gradients of the trainable low-rank update on CUDA in Triton: five launches, whatever the adapters.

`outer` sums over the tokens of a segment: gradients of A, or of B, d and y. Each sum is one program's, over its own
segment in ascending order: there are no atomics, and no result depends on the other adapters. The gradient of x, and
what is needed of it, come from the kernels of the update itself. Nothing here has been timed on a GPU.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorasrv_kernels.lora.training.reference import Gradients, LoraUpdateGrad, any_d
from lorasrv_kernels.lora.training.triton_kernels import launch_expand, launch_shrink
from lorasrv_kernels.lora.training.triton_plan import (
    A_START,
    B_START,
    COLUMN,
    D_START,
    FIRST_ROW,
    LAST_ROW,
    NUM_COLUMNS,
    PLACE,
    RANK,
    TILING,
    WIDTH,
    Plan,
    Tiling,
    flat_factors,
    plan,
    precision,
    rows_together,
)


def lora_update_grad(call: LoraUpdateGrad, *, tiling: Tiling = TILING) -> Gradients:
    """The gradients of `lora_update`, as the reference states them."""
    grad, x, y = rows_together(call.grad), rows_together(call.x), None if call.y is None else rows_together(call.y)
    layout = plan(call, tiling)
    a, b, d = flat_factors(call)
    own_d = d if any_d(call.d) else None
    grad_y = grad.new_empty(grad.shape if own_d is not None else (0, grad.shape[1]))
    grad_x = x.new_empty(x.shape)
    grad_a, grad_b, grad_d = (torch.empty_like(flat) for flat in (a, b, d))
    shrunk, back = x.new_empty(2, len(x), layout.width, dtype=torch.float32)
    num_slices, width = len(call.out_features), max(call.out_features, default=0)
    if len(layout.tiles):
        launch_shrink(shrunk, x, a, None, layout, num_slices, backward=False, tiling=tiling)
        launch_shrink(back, grad, b, own_d, layout, num_slices, backward=True, tiling=tiling)
        launch_expand(grad_x, back, a, (layout.whole, layout.tiles, 1, x.shape[1]), tiling)
    if len(layout.table):
        _outer(grad_a, back, x, layout, x.shape[1], tiling)
        _outer(grad_b, shrunk, grad, layout, width, tiling, gradients=(b, own_d, y, grad_y, grad_d))
    return grad_y, grad_x, _like(grad_a, call.a), _like(grad_b, call.b), _like(grad_d, call.d)


def _like(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a flat tensor, as views: a copy of each would be a launch of each."""
    parts = flat.reshape(-1).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


@triton.jit
def outer(
    out,  # gradients of A of all adapters, or of B
    shrunk,  # [T, shrunk_stride] float32
    x,  # [T, ...], rows x_stride apart
    b,  # of all adapters; None for the gradients of A
    d,  # of all adapters, or None
    y,  # [T, ...] if d
    grad_y,  # [T, ...] if d
    grad_d,
    scales,
    table,
    x_stride,
    y_stride,
    grad_y_stride,
    shrunk_stride,
    IN_FEATURES: tl.constexpr,
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out <- shrunk^T x over the rows of each segment, in order; of B with its call. Grid [pieces, column blocks].

    With d, the program of some columns of B also gives their gradients of d and y.
    """
    piece = tl.program_id(0)
    entry = table + piece * NUM_COLUMNS
    width = tl.load(entry + WIDTH).to(tl.int32) if b is not None else IN_FEATURES
    if tl.program_id(1) * COLUMNS >= width:
        return
    rank = tl.load(entry + RANK).to(tl.int32)
    place = tl.load(entry + PLACE)
    first_row = tl.load(entry + FIRST_ROW)
    num_rows = (tl.load(entry + LAST_ROW) - first_row).to(tl.int32)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    first = tl.load(entry + COLUMN) if b is not None else 0
    x_columns = x + first + columns[None, :]
    start = tl.load(entry + B_START) if b is not None else tl.load(entry + A_START) * IN_FEATURES
    d_offset = tl.load(entry + D_START)
    own = tl.full((COLUMNS,), 1.0, dtype=tl.float32)
    total_d = tl.zeros((COLUMNS,), dtype=tl.float32)
    if d is not None:
        own = tl.load(d + d_offset + columns, mask=inside & (d_offset >= 0), other=1.0)
        for step in range(0, num_rows, TOKENS):
            tokens = step + tl.arange(0, TOKENS)
            rows = (first_row + tokens)[:, None]
            mask = (tokens < num_rows)[:, None] & inside[None, :]
            part = tl.load(x_columns + rows * x_stride, mask=mask, other=0.0).to(tl.float32)
            base = tl.load(y + rows * y_stride + first + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            total_d += tl.sum(part * base, axis=0)
            at_y = grad_y + rows * grad_y_stride + first + columns[None, :]
            tl.store(at_y, (part * own[None, :]).to(grad_y.dtype.element_ty), mask=mask)
    for first_rank in range(0, rank, RANKS):
        ranks = first_rank + tl.arange(0, RANKS)
        known = ranks < rank
        total = tl.zeros((RANKS, COLUMNS), dtype=tl.float32)
        for step in range(0, num_rows, TOKENS):
            tokens = step + tl.arange(0, TOKENS)
            present = tokens < num_rows
            rows = first_row + tokens
            part = tl.load(x_columns + rows[:, None] * x_stride, mask=present[:, None] & inside[None, :], other=0.0).to(
                tl.float32
            )
            left = tl.load(
                shrunk + rows[None, :] * shrunk_stride + place + ranks[:, None],
                mask=known[:, None] & present[None, :],
                other=0.0,
            )
            total = tl.dot(left, part, total, input_precision=PRECISION)
        mask = known[:, None] & inside[None, :]
        if b is not None:
            at = start + columns[None, :] * rank + ranks[:, None]
            scaled = tl.load(scales + piece) * total
            if d is not None:
                total_d += tl.sum(tl.load(b + at, mask=mask, other=0.0) * scaled, axis=0)
            tl.store(out + at, own[None, :] * scaled, mask=mask)
        else:
            tl.store(out + start + ranks[:, None] * IN_FEATURES + columns[None, :], total, mask=mask)
    if d is not None:
        tl.store(grad_d + d_offset + columns, total_d, mask=inside & (d_offset >= 0))


def _outer(
    out: Tensor,
    shrunk: Tensor,
    x: Tensor,
    layout: Plan,
    max_width: int,
    tiling: Tiling,
    *,
    gradients: tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor] | None = None,
) -> None:
    b, d, y, grad_y, grad_d = gradients or (None, None, None, None, None)
    outer[len(layout.table), triton.cdiv(max_width, tiling.columns)](
        out,
        shrunk,
        x,
        b,
        d,
        y,
        grad_y,
        grad_d,
        layout.scales,
        layout.table,
        x.stride(0),
        0 if y is None else y.stride(0),
        0 if grad_y is None else grad_y.stride(0),
        shrunk.stride(0),
        IN_FEATURES=x.shape[1],
        TOKENS=tiling.tokens,
        RANKS=tiling.ranks,
        COLUMNS=tiling.columns,
        PRECISION=precision(x),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
