"""Contract of the batched low-rank update: schema, checks and the default implementation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.lora import reference

_library = torch.library.Library("lorasrv", "FRAGMENT")
_library.define(
    "lora_apply_(Tensor(a!) y, Tensor x, Tensor arena, Tensor table, int[] out_features, "
    "Tensor rows, Tensor weights, Tensor tile_slots, Tensor tile_starts) -> ()"
)


def check(
    y: Tensor,
    x: Tensor,
    arena: Tensor,
    table: Tensor,
    out_features: Sequence[int],
    rows: Tensor,
    weights: Tensor,
    tile_slots: Tensor,
    tile_starts: Tensor,
) -> None:
    """Raises KernelError naming every argument that breaks the contract of `lora_apply_`."""
    tokens = x.shape[0]
    expected = [
        (x.ndim == 2, f"x must be [T, I], got {list(x.shape)}"),
        (y.shape == (tokens, sum(out_features)), f"y must be {[tokens, sum(out_features)]}, got {list(y.shape)}"),
        (y.dtype == x.dtype, f"y and x must have one dtype, got {y.dtype} and {x.dtype}"),
        (arena.ndim == 1 and arena.dtype == x.dtype, f"arena must be 1-D {x.dtype}, got {arena.ndim}-D {arena.dtype}"),
        (
            table.dtype == torch.int64 and table.ndim == 3 and table.shape[1:] == (len(out_features), 4),
            f"table must be int64 [S, {len(out_features)}, 4], got {table.dtype} {list(table.shape)}",
        ),
        (rows.shape == weights.shape and rows.dtype == torch.int64, "rows int64 [E] and weights [E] must agree"),
        (len(tile_starts) == len(tile_slots) + 1, "tile_starts must be [K + 1] for tile_slots [K]"),
    ]
    wrong = [message for holds, message in expected if not holds]
    if wrong:
        raise KernelError("lora_apply_: " + "; ".join(wrong))


def _default(
    y: Tensor,
    x: Tensor,
    arena: Tensor,
    table: Tensor,
    out_features: Sequence[int],
    rows: Tensor,
    weights: Tensor,
    tile_slots: Tensor,
    tile_starts: Tensor,
) -> None:
    check(y, x, arena, table, out_features, rows, weights, tile_slots, tile_starts)
    reference.lora_apply_(y, x, arena, table, out_features, rows, weights, tile_slots, tile_starts)


_library.impl("lora_apply_", _default, "CompositeExplicitAutograd")
_library.impl("lora_apply_", check, "Meta")
