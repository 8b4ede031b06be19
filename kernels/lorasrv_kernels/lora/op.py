"""Contract of the batched low-rank update: schemas, checks and the default implementation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.lora import reference
from lorasrv_kernels.table import Column

_library = torch.library.Library("lorasrv", "FRAGMENT")
_library.define(
    "lora_apply_(Tensor(a!) y, Tensor x, Tensor arena, Tensor table, int[] out_features, "
    "Tensor rows, Tensor weights, Tensor tile_slots, Tensor tile_starts, Tensor base_rows, Tensor? bias, "
    "int max_rank=0) -> ()"
)
_library.define(
    "lora_embed_(Tensor(a!) y, Tensor tokens, Tensor arena, Tensor table, "
    "Tensor rows, Tensor weights, Tensor tile_slots, Tensor tile_starts, Tensor base_rows) -> ()"
)


def check_apply(
    y: Tensor,
    x: Tensor,
    arena: Tensor,
    table: Tensor,
    out_features: Sequence[int],
    rows: Tensor,
    weights: Tensor,
    tile_slots: Tensor,
    tile_starts: Tensor,
    base_rows: Tensor,
    bias: Tensor | None,
    max_rank: int = 0,
) -> None:
    """Raises KernelError naming every argument that breaks the contract of `lora_apply_`."""
    tokens, width = x.shape[0], sum(out_features)
    expected = [
        (x.ndim == 2, f"x must be [T, I], got {list(x.shape)}"),
        (y.shape == (tokens, width), f"y must be {[tokens, width]}, got {list(y.shape)}"),
        (y.dtype == x.dtype, f"y and x must have one dtype, got {y.dtype} and {x.dtype}"),
        (
            table.ndim == 3 and table.shape[1] == len(out_features),
            f"table must be [S, {len(out_features)}, {len(Column)}], got {list(table.shape)}",
        ),
        (
            bias is None or (bias.shape == (width,) and bias.dtype == y.dtype),
            f"bias must be {y.dtype} [{width}], got {None if bias is None else (bias.dtype, list(bias.shape))}",
        ),
        (max_rank >= 0, f"max_rank must not be negative, got {max_rank}"),
        *_expected_slots(arena, table, y.dtype, rows, weights, tile_slots, tile_starts, base_rows),
    ]
    _raise_if_wrong("lora_apply_", expected)


def check_embed(
    y: Tensor,
    tokens: Tensor,
    arena: Tensor,
    table: Tensor,
    rows: Tensor,
    weights: Tensor,
    tile_slots: Tensor,
    tile_starts: Tensor,
    base_rows: Tensor,
) -> None:
    """Raises KernelError naming every argument that breaks the contract of `lora_embed_`."""
    expected = [
        (tokens.ndim == 1 and tokens.dtype == torch.int64, f"tokens must be int64 [T], got {list(tokens.shape)}"),
        (y.ndim == 2 and y.shape[0] == tokens.shape[0], f"y must be [{tokens.shape[0]}, O], got {list(y.shape)}"),
        (table.ndim == 2, f"table must be [S, {len(Column)}], got {list(table.shape)}"),
        *_expected_slots(arena, table, y.dtype, rows, weights, tile_slots, tile_starts, base_rows),
    ]
    _raise_if_wrong("lora_embed_", expected)


def _expected_slots(
    arena: Tensor,
    table: Tensor,
    dtype: torch.dtype,
    rows: Tensor,
    weights: Tensor,
    tile_slots: Tensor,
    tile_starts: Tensor,
    base_rows: Tensor,
) -> list[tuple[bool, str]]:
    return [
        (arena.ndim == 1 and arena.dtype == dtype, f"arena must be 1-D {dtype}, got {arena.ndim}-D {arena.dtype}"),
        (
            table.dtype == torch.int64 and table.shape[-1] == len(Column),
            f"table must be int64 with {len(Column)} columns, got {table.dtype} {list(table.shape)}",
        ),
        (rows.shape == weights.shape and rows.dtype == torch.int64, "rows int64 [E] and weights [E] must agree"),
        (len(tile_starts) == len(tile_slots) + 1, "tile_starts must be [K + 1] for tile_slots [K]"),
        (base_rows.ndim == 1 and base_rows.dtype == torch.int64, "base_rows must be int64 [T']"),
    ]


def _raise_if_wrong(name: str, expected: list[tuple[bool, str]]) -> None:
    wrong = [message for holds, message in expected if not holds]
    if wrong:
        raise KernelError(f"{name}: " + "; ".join(wrong))


def _apply(
    y: Tensor,
    x: Tensor,
    arena: Tensor,
    table: Tensor,
    out_features: Sequence[int],
    rows: Tensor,
    weights: Tensor,
    tile_slots: Tensor,
    tile_starts: Tensor,
    base_rows: Tensor,
    bias: Tensor | None,
    max_rank: int = 0,
) -> None:
    check_apply(y, x, arena, table, out_features, rows, weights, tile_slots, tile_starts, base_rows, bias, max_rank)
    reference.lora_apply_(y, x, arena, table, out_features, rows, weights, tile_slots, tile_starts, base_rows, bias)


def _embed(
    y: Tensor,
    tokens: Tensor,
    arena: Tensor,
    table: Tensor,
    rows: Tensor,
    weights: Tensor,
    tile_slots: Tensor,
    tile_starts: Tensor,
    base_rows: Tensor,
) -> None:
    check_embed(y, tokens, arena, table, rows, weights, tile_slots, tile_starts, base_rows)
    reference.lora_embed_(y, tokens, arena, table, rows, weights, tile_slots, tile_starts)


_library.impl("lora_apply_", _apply, "CompositeExplicitAutograd")
_library.impl("lora_apply_", check_apply, "Meta")
_library.impl("lora_embed_", _embed, "CompositeExplicitAutograd")
_library.impl("lora_embed_", check_embed, "Meta")
