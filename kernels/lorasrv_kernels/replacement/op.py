"""Contract of replaced weights: schemas, checks and the default implementations."""

import torch
from torch import Tensor

from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.replacement import reference
from lorasrv_kernels.table import Column

_library = torch.library.Library("lorasrv", "FRAGMENT")
_library.define(
    "replaced_embedding(Tensor tokens, Tensor weight, Tensor arena, Tensor table, "
    "Tensor rows, Tensor tile_slots, Tensor tile_starts) -> Tensor"
)
_library.define(
    "replaced_linear(Tensor x, Tensor weight, Tensor arena, Tensor table, "
    "Tensor rows, Tensor tile_slots, Tensor tile_starts) -> Tensor"
)
_library.define(
    "replaced_scale_(Tensor(a!) y, Tensor weight, Tensor arena, Tensor table, "
    "Tensor rows, Tensor tile_slots, Tensor tile_starts) -> ()"
)


def check_embedding(
    tokens: Tensor,
    weight: Tensor,
    arena: Tensor,
    table: Tensor,
    rows: Tensor,
    tile_slots: Tensor,
    tile_starts: Tensor,
) -> Tensor:
    """Raises KernelError naming whatever breaks the contract of `replaced_embedding`; the result is unset."""
    wrong = _wrong_slots(weight, arena, table, rows, tile_slots, tile_starts)
    if tokens.ndim != 1 or tokens.dtype != torch.int64:
        wrong.append(f"tokens must be int64 [T], got {tokens.dtype} {list(tokens.shape)}")
    if weight.ndim != 2:
        wrong.append(f"weight must be [V, O], got {list(weight.shape)}")
    _raise_if_wrong("replaced_embedding", wrong)
    return weight.new_empty(tokens.shape[0], weight.shape[1])


def check_linear(
    x: Tensor,
    weight: Tensor,
    arena: Tensor,
    table: Tensor,
    rows: Tensor,
    tile_slots: Tensor,
    tile_starts: Tensor,
) -> Tensor:
    """Raises KernelError naming whatever breaks the contract of `replaced_linear`; the result is unset."""
    wrong = _wrong_slots(weight, arena, table, rows, tile_slots, tile_starts)
    if weight.ndim != 2 or not weight.is_contiguous() or x.ndim != 2 or x.shape[1] != weight.shape[1]:
        wrong.append(f"x must be [T, I] and weight contiguous [O, I], got {list(x.shape)} and {list(weight.shape)}")
    if x.dtype != weight.dtype:
        wrong.append(f"x and weight must have one dtype, got {x.dtype} and {weight.dtype}")
    _raise_if_wrong("replaced_linear", wrong)
    return x.new_empty(x.shape[0], weight.shape[0])


def check_scale(
    y: Tensor, weight: Tensor, arena: Tensor, table: Tensor, rows: Tensor, tile_slots: Tensor, tile_starts: Tensor
) -> None:
    """Raises KernelError naming whatever breaks the contract of `replaced_scale_`."""
    wrong = _wrong_slots(weight, arena, table, rows, tile_slots, tile_starts)
    if y.ndim < 2 or weight.shape != y.shape[-1:] or y.dtype != weight.dtype:
        wrong.append(f"y must be {weight.dtype} [T, ..., {weight.shape[-1]}], got {y.dtype} {list(y.shape)}")
    _raise_if_wrong("replaced_scale_", wrong)


def _wrong_slots(
    weight: Tensor, arena: Tensor, table: Tensor, rows: Tensor, tile_slots: Tensor, tile_starts: Tensor
) -> list[str]:
    expected = [
        (
            arena.ndim == 1 and arena.dtype == weight.dtype,
            f"arena must be 1-D {weight.dtype}, got {arena.ndim}-D {arena.dtype}",
        ),
        (
            table.dtype == torch.int64 and table.ndim == 2 and table.shape[1] == len(Column),
            f"table must be int64 [S, {len(Column)}], got {table.dtype} {list(table.shape)}",
        ),
        (rows.ndim == 1 and rows.dtype == torch.int64, "rows must be int64 [E]"),
        (len(tile_starts) == len(tile_slots) + 1, "tile_starts must be [K + 1] for tile_slots [K]"),
    ]
    return [message for holds, message in expected if not holds]


def _raise_if_wrong(name: str, wrong: list[str]) -> None:
    if wrong:
        raise KernelError(f"{name}: " + "; ".join(wrong))


def _embedding(
    tokens: Tensor,
    weight: Tensor,
    arena: Tensor,
    table: Tensor,
    rows: Tensor,
    tile_slots: Tensor,
    tile_starts: Tensor,
) -> Tensor:
    out = check_embedding(tokens, weight, arena, table, rows, tile_slots, tile_starts)
    reference.embedding_(out, tokens, weight, arena, table, rows, tile_slots, tile_starts)
    return out


def _linear(
    x: Tensor,
    weight: Tensor,
    arena: Tensor,
    table: Tensor,
    rows: Tensor,
    tile_slots: Tensor,
    tile_starts: Tensor,
) -> Tensor:
    out = check_linear(x, weight, arena, table, rows, tile_slots, tile_starts)
    reference.linear_(out, x, weight, arena, table, rows, tile_slots, tile_starts)
    return out


def _scale(
    y: Tensor, weight: Tensor, arena: Tensor, table: Tensor, rows: Tensor, tile_slots: Tensor, tile_starts: Tensor
) -> None:
    check_scale(y, weight, arena, table, rows, tile_slots, tile_starts)
    reference.scale_(y, weight, arena, table, rows, tile_slots, tile_starts)


_library.impl("replaced_embedding", _embedding, "CompositeExplicitAutograd")
_library.impl("replaced_embedding", check_embedding, "Meta")
_library.impl("replaced_linear", _linear, "CompositeExplicitAutograd")
_library.impl("replaced_linear", check_linear, "Meta")
_library.impl("replaced_scale_", _scale, "CompositeExplicitAutograd")
_library.impl("replaced_scale_", check_scale, "Meta")
