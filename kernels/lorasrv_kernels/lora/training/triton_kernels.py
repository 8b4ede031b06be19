"""The trainable low-rank update on CUDA in Triton: two launches forward and five backward, whatever the adapters.

`shrink` writes x A^T, or of the incoming gradient d * grad B; `expand` multiplies with B^T and finishes the rows, or
with A and gives the gradient of x; `outer` sums over the tokens of a segment: gradients of A, or of B, d and y.
Ranks and places come from a table that holds for all layers of one shape in a step. Each sum is one program's, over its
own segment in ascending order: there are no atomics, and no result depends on the other adapters.

A, B and d of all adapters are laid one after the other first, which copies them unless they lie so already. Products
are float32: exact for float32 activations, three TF32 products for the others. Offsets within one A or B are 32 bits
wide, which holds 2^31 numbers, and saves the registers that would spill. Nothing here has been timed on a GPU.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorasrv_kernels.concatenate import concatenate
from lorasrv_kernels.lora.training.reference import Gradients, any_d, pieces

NUM_COLUMNS = tl.constexpr(9)
"""Of the table: rows, columns of the slice, rank rows within the segment, and where A, B and d begin."""

_FIRST_ROW, _LAST_ROW, _COLUMN, _WIDTH, _PLACE, _RANK, _A, _B, _D = (tl.constexpr(index) for index in range(9))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """Sizes of the blocks one program works on. Not measured on a device yet."""

    tokens: int = 32
    """Rows of a program of `shrink` and `expand`, and rows at a time of `outer`."""
    ranks: int = 16
    depth: int = 32
    """Features at a time of `shrink`."""
    columns: int = 64
    num_warps: int = 8
    num_stages: int = 2


TILING = Tiling()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Tables on the device for one batch over one shape of layer."""

    table: Tensor  # [J * G, NUM_COLUMNS] int64, a row per segment and slice
    whole: Tensor  # [J, NUM_COLUMNS] int64, a row per segment: all its rank rows, and all of I
    scales: Tensor  # [J * G] float32
    tiles: Tensor  # [K, 2] int64: a segment, and the first of the rows of its that a program takes
    width: int
    """Rank rows of the segment that has most."""


@functools.lru_cache(maxsize=64)
def plan(
    segment_tokens: tuple[int, ...],
    out_features: tuple[int, ...],
    in_features: int,
    ranks: tuple[int, ...],
    has_d: tuple[bool, ...],
    scales: tuple[float, ...],
    tile_tokens: int,
    device: torch.device,
) -> Plan:
    """Copied to the device once for all layers of this shape in a step."""
    num_slices = len(out_features)
    a_rows = [0, *accumulate(ranks)]
    rows, whole, b_offset, d_offset = [], [], 0, 0
    for piece in pieces(segment_tokens, out_features):
        index, width = piece.index, piece.columns.stop - piece.columns.start
        segment = index // num_slices * num_slices
        place = a_rows[index] - a_rows[segment]
        bounds = (piece.rows.start, piece.rows.stop)
        own_d = d_offset if has_d[index] else -1
        rows.append((*bounds, piece.columns.start, width, place, ranks[index], a_rows[index], b_offset, own_d))
        if index == segment:
            all_ranks = a_rows[segment + num_slices] - a_rows[segment]
            whole.append((*bounds, 0, in_features, 0, all_ranks, a_rows[segment], 0, -1))
        b_offset += ranks[index] * width
        d_offset += width if has_d[index] else 0
    tiles = [(segment, row) for segment, bounds in enumerate(whole) for row in range(bounds[0], bounds[1], tile_tokens)]
    with torch.inference_mode(mode=False):
        return Plan(
            table=_numbers(rows, 9, device),
            whole=_numbers(whole, 9, device),
            scales=torch.tensor(scales, dtype=torch.float32, device=device),
            tiles=_numbers(tiles, 2, device),
            width=max((row[5] for row in whole), default=0),
        )


def _numbers(rows: Sequence[Sequence[int]], width: int, device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=device).view(-1, width)


def lora_update(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    d: Sequence[Tensor],
    scales: Sequence[float],
    out_features: Sequence[int],
    segment_tokens: Sequence[int],
    *,
    tiling: Tiling = TILING,
) -> Tensor:
    """See `lorasrv_kernels.lora.training.lora_update`. Arguments as the op takes them, on one CUDA device."""
    y, x = _rows(y), _rows(x)
    result = y.new_empty(y.shape)
    layout = _plan(x, a, d, scales, out_features, segment_tokens, tiling)
    if not len(layout.tiles):
        return result
    flat_a, flat_b, flat_d = concatenate(a), _flat(b), _flat(d)
    shrunk = x.new_empty(len(x), layout.width, dtype=torch.float32)
    _shrink(shrunk, x, flat_a, None, layout, len(out_features), backward=False, tiling=tiling)
    sizes = (layout.table, layout.tiles, len(out_features), max(out_features))
    _expand(result, shrunk, flat_b, sizes, tiling, y=y, d=flat_d if any_d(d) else None, scales=layout.scales)
    return result


def lora_update_grad(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    d: Sequence[Tensor],
    scales: Sequence[float],
    out_features: Sequence[int],
    segment_tokens: Sequence[int],
    *,
    tiling: Tiling = TILING,
) -> Gradients:
    """The gradients of `lora_update`, as the reference states them."""
    grad, x, y = _rows(grad), _rows(x), None if y is None else _rows(y)
    layout = _plan(x, a, d, scales, out_features, segment_tokens, tiling)
    flat_a, flat_b, flat_d = concatenate(a), _flat(b), _flat(d)
    own_d = flat_d if any_d(d) else None
    grad_y = grad.new_empty(grad.shape if own_d is not None else (0, grad.shape[1]))
    grad_x = x.new_empty(x.shape)
    grad_a, grad_b, grad_d = (torch.empty_like(flat) for flat in (flat_a, flat_b, flat_d))
    shrunk, back = x.new_empty(2, len(x), layout.width, dtype=torch.float32)
    num_slices, width = len(out_features), max(out_features, default=0)
    if len(layout.tiles):
        _shrink(shrunk, x, flat_a, None, layout, num_slices, backward=False, tiling=tiling)
        _shrink(back, grad, flat_b, own_d, layout, num_slices, backward=True, tiling=tiling)
        _expand(grad_x, back, flat_a, (layout.whole, layout.tiles, 1, x.shape[1]), tiling)
    if len(layout.table):
        _outer(grad_a, back, x, layout, x.shape[1], tiling)
        gradients = (flat_b, own_d, y, grad_y, grad_d)
        _outer(grad_b, shrunk, grad, layout, width, tiling, gradients=gradients)
    return grad_y, grad_x, _like(grad_a, a), _like(grad_b, b), _like(grad_d, d)


def _plan(
    x: Tensor,
    a: Sequence[Tensor],
    d: Sequence[Tensor],
    scales: Sequence[float],
    out_features: Sequence[int],
    segment_tokens: Sequence[int],
    tiling: Tiling,
) -> Plan:
    ranks, has_d = tuple(len(factor) for factor in a), tuple(len(own) > 0 for own in d)
    sizes = (tuple(segment_tokens), tuple(out_features), x.shape[1], ranks, has_d, tuple(scales))
    return plan(*sizes, tiling.tokens, x.device)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return concatenate([tensor.reshape(-1) for tensor in tensors])


def _like(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a flat tensor, as views: a copy of each would be a launch of each."""
    parts = flat.reshape(-1).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _precision(like: Tensor) -> str:
    return "ieee" if like.dtype == torch.float32 else "tf32x3"


@triton.jit
def shrink(
    out,  # [T, out_stride] float32
    x,  # [T, ...], rows x_stride apart
    matrix,  # A of all adapters, or B
    d,  # of all adapters, or None
    scales,
    table,
    tiles,
    num_slices,
    out_stride,
    x_stride,
    IN_FEATURES: tl.constexpr,
    BACKWARD: tl.constexpr,
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out <- x A^T, or backward scale * (d * x) B, x then being the incoming gradient. Grid [tiles, slices]."""
    tile = tiles + 2 * tl.program_id(0)
    piece = tl.load(tile) * num_slices + tl.program_id(1)
    entry = table + piece * NUM_COLUMNS
    rank = tl.load(entry + _RANK).to(tl.int32)
    length = tl.load(entry + _WIDTH).to(tl.int32) if BACKWARD else IN_FEATURES
    first = tl.load(entry + _COLUMN) if BACKWARD else 0
    place = tl.load(entry + _PLACE)
    d_offset = tl.load(entry + _D)
    rows = tl.load(tile + 1) + tl.arange(0, TOKENS)
    present = rows < tl.load(entry + _LAST_ROW)
    x_rows = x + rows[:, None] * x_stride + first
    own_matrix = matrix + (tl.load(entry + _B) if BACKWARD else tl.load(entry + _A) * IN_FEATURES)
    for first_rank in range(0, rank, RANKS):
        ranks = first_rank + tl.arange(0, RANKS)
        known = ranks < rank
        total = tl.zeros((TOKENS, RANKS), dtype=tl.float32)
        for step in range(0, length, DEPTH):
            features = step + tl.arange(0, DEPTH)
            inside = features < length
            part = tl.load(x_rows + features[None, :], mask=present[:, None] & inside[None, :], other=0.0)
            part = part.to(tl.float32)
            if BACKWARD:
                at = features[:, None] * rank + ranks[None, :]
                if d is not None:
                    own = tl.load(d + d_offset + features, mask=inside & (d_offset >= 0), other=1.0)
                    part *= own[None, :]
            else:
                at = ranks[None, :] * IN_FEATURES + features[:, None]
            factor = tl.load(own_matrix + at, mask=inside[:, None] & known[None, :], other=0.0)
            total = tl.dot(part, factor, total, input_precision=PRECISION)
        if BACKWARD:
            total *= tl.load(scales + piece)
        at = out + rows[:, None] * out_stride + place + ranks[None, :]
        tl.store(at, total, mask=present[:, None] & known[None, :])


@triton.jit
def expand(
    out,  # [T, ...], rows out_stride apart
    shrunk,  # [T, shrunk_stride] float32
    matrix,  # B of all adapters, or A
    y,  # [T, ...] or None, for A
    d,  # of all adapters, or None
    scales,  # None for A
    table,
    tiles,
    num_slices,
    out_stride,
    y_stride,
    shrunk_stride,
    IN_FEATURES: tl.constexpr,
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out <- d * (y + scale * shrunk B^T), or shrunk A. Grid [tiles, blocks of columns, slices]."""
    tile = tiles + 2 * tl.program_id(0)
    piece = tl.load(tile) * num_slices + tl.program_id(2)
    entry = table + piece * NUM_COLUMNS
    width = tl.load(entry + _WIDTH).to(tl.int32)
    if tl.program_id(1) * COLUMNS >= width:
        return
    rank = tl.load(entry + _RANK).to(tl.int32)
    place = tl.load(entry + _PLACE)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    rows = tl.load(tile + 1) + tl.arange(0, TOKENS)
    present = rows < tl.load(entry + _LAST_ROW)
    own_matrix = matrix + (tl.load(entry + _B) if y is not None else tl.load(entry + _A) * IN_FEATURES)
    total = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for first_rank in range(0, rank, RANKS):
        ranks = first_rank + tl.arange(0, RANKS)
        known = ranks < rank
        at = shrunk + rows[:, None] * shrunk_stride + place + ranks[None, :]
        part = tl.load(at, mask=present[:, None] & known[None, :], other=0.0)
        if y is not None:
            at_factor = columns[None, :] * rank + ranks[:, None]
        else:
            at_factor = ranks[:, None] * IN_FEATURES + columns[None, :]
        factor = tl.load(own_matrix + at_factor, mask=known[:, None] & inside[None, :], other=0.0)
        total = tl.dot(part, factor, total, input_precision=PRECISION)
    mask = present[:, None] & inside[None, :]
    first = tl.load(entry + _COLUMN)
    if y is not None:
        base = tl.load(y + rows[:, None] * y_stride + first + columns[None, :], mask=mask, other=0.0)
        total = base.to(tl.float32) + tl.load(scales + piece) * total
        if d is not None:
            d_offset = tl.load(entry + _D)
            own = tl.load(d + d_offset + columns, mask=inside & (d_offset >= 0), other=1.0)
            total *= own[None, :]
    at_out = out + rows[:, None] * out_stride + first + columns[None, :]
    tl.store(at_out, total.to(out.dtype.element_ty), mask=mask)


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
    """out <- shrunk^T x over the rows of each segment, in order; of B with its factors. Grid [pieces, column blocks].

    With d, the program of some columns of B also gives their gradients of d and y.
    """
    piece = tl.program_id(0)
    entry = table + piece * NUM_COLUMNS
    width = tl.load(entry + _WIDTH).to(tl.int32) if b is not None else IN_FEATURES
    if tl.program_id(1) * COLUMNS >= width:
        return
    rank = tl.load(entry + _RANK).to(tl.int32)
    place = tl.load(entry + _PLACE)
    first_row = tl.load(entry + _FIRST_ROW)
    num_rows = (tl.load(entry + _LAST_ROW) - first_row).to(tl.int32)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    first = tl.load(entry + _COLUMN) if b is not None else 0
    x_columns = x + first + columns[None, :]
    start = tl.load(entry + _B) if b is not None else tl.load(entry + _A) * IN_FEATURES
    d_offset = tl.load(entry + _D)
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


def _shrink(
    out: Tensor,
    x: Tensor,
    matrix: Tensor,
    d: Tensor | None,
    layout: Plan,
    num_slices: int,
    *,
    backward: bool,
    tiling: Tiling,
) -> None:
    shrink[len(layout.tiles), num_slices](
        out,
        x,
        matrix,
        d,
        layout.scales,
        layout.table,
        layout.tiles,
        num_slices,
        out.stride(0),
        x.stride(0),
        IN_FEATURES=x.shape[1],
        BACKWARD=backward,
        TOKENS=tiling.tokens,
        RANKS=tiling.ranks,
        DEPTH=tiling.depth,
        PRECISION=_precision(x),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )


def _expand(
    out: Tensor,
    shrunk: Tensor,
    matrix: Tensor,
    sizes: tuple[Tensor, Tensor, int, int],
    tiling: Tiling,
    *,
    y: Tensor | None = None,
    d: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    table, tiles, num_slices, max_width = sizes
    expand[len(tiles), triton.cdiv(max_width, tiling.columns), num_slices](
        out,
        shrunk,
        matrix,
        y,
        d,
        scales,
        table,
        tiles,
        num_slices,
        out.stride(0),
        0 if y is None else y.stride(0),
        shrunk.stride(0),
        IN_FEATURES=out.shape[1],
        TOKENS=tiling.tokens,
        RANKS=tiling.ranks,
        COLUMNS=tiling.columns,
        PRECISION=_precision(out),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )


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
        PRECISION=_precision(x),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
