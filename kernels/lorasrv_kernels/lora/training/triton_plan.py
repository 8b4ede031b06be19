"""Where the adapters of a training batch lie, for the Triton kernels: tables on the device, and numbers side by side.

Ranks and places come from a table that holds for all layers of one shape in a step. A, B and d of all adapters are laid
one after the other, which copies them unless they lie so already.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton.language as tl
from torch import Tensor

from lorasrv_kernels.concatenate import concatenate
from lorasrv_kernels.lora.training.reference import LoraUpdate, LoraUpdateGrad, pieces

NUM_COLUMNS = tl.constexpr(9)
"""Of the table: rows, columns of the slice, rank rows within the segment, and where A, B and d begin."""

FIRST_ROW, LAST_ROW, COLUMN, WIDTH, PLACE, RANK, A_START, B_START, D_START = (tl.constexpr(index) for index in range(9))
"""The columns, in this order."""


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
def _plan(
    segment_tokens: tuple[int, ...],
    out_features: tuple[int, ...],
    in_features: int,
    ranks: tuple[int, ...],
    has_d: tuple[bool, ...],
    scales: tuple[float, ...],
    tile_tokens: int,
    device: torch.device,
) -> Plan:
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


def plan(call: LoraUpdate | LoraUpdateGrad, tiling: Tiling) -> Plan:
    """Of one call; copied to the device once for all layers of this shape in a step."""
    ranks, has_d = tuple(len(factor) for factor in call.a), tuple(len(own) > 0 for own in call.d)
    sizes = (tuple(call.segment_tokens), tuple(call.out_features), call.x.shape[1], ranks, has_d)
    return _plan(*sizes, tuple(call.scales), tiling.tokens, call.x.device)


def flat_factors(call: LoraUpdate | LoraUpdateGrad) -> tuple[Tensor, Tensor, Tensor]:
    """All A, all B and all d, each one after the other."""
    return concatenate(call.a), _flat(call.b), _flat(call.d)


def rows_together(tensor: Tensor) -> Tensor:
    """The tensor, or a copy whose rows are contiguous."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return concatenate([tensor.reshape(-1) for tensor in tensors])


def precision(like: Tensor) -> str:
    """How products of activations of this dtype are computed."""
    return "ieee" if like.dtype == torch.float32 else "tf32x3"
