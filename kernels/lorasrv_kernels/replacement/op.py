"""Contract of replaced weights: checks, shapes, and who serves."""

import torch
from torch import Tensor

from lorasrv_kernels import operators
from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.replacement import reference
from lorasrv_kernels.replacement.reference import Replaced
from lorasrv_kernels.table import Column


def check_embedding(call: Replaced) -> None:
    """Raises KernelError naming whatever breaks the contract of `replaced_embedding`."""
    wrong, tokens, weight = _wrong_slots(call), call.x, call.weight
    if tokens.ndim != 1 or tokens.dtype != torch.int64:
        wrong.append(f"tokens must be int64 [T], got {tokens.dtype} {list(tokens.shape)}")
    if weight.ndim != 2:
        wrong.append(f"weight must be [V, O], got {list(weight.shape)}")
    _raise_if_wrong("replaced_embedding", wrong)


def check_linear(call: Replaced) -> None:
    """Raises KernelError naming whatever breaks the contract of `replaced_linear`."""
    wrong, x, weight = _wrong_slots(call), call.x, call.weight
    if weight.ndim != 2 or not weight.is_contiguous() or x.ndim != 2 or x.shape[1] != weight.shape[1]:
        wrong.append(f"x must be [T, I] and weight contiguous [O, I], got {list(x.shape)} and {list(weight.shape)}")
    if x.dtype != weight.dtype:
        wrong.append(f"x and weight must have one dtype, got {x.dtype} and {weight.dtype}")
    _raise_if_wrong("replaced_linear", wrong)


def check_scale(call: Replaced) -> None:
    """Raises KernelError naming whatever breaks the contract of `replaced_scale_`."""
    wrong, y, weight = _wrong_slots(call), call.x, call.weight
    if y.ndim < 2 or weight.shape != y.shape[-1:] or y.dtype != weight.dtype:
        wrong.append(f"y must be {weight.dtype} [T, ..., {weight.shape[-1]}], got {y.dtype} {list(y.shape)}")
    _raise_if_wrong("replaced_scale_", wrong)


def _wrong_slots(call: Replaced) -> list[str]:
    _, weight, arena, table, rows, tile_slots, tile_starts = call
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


def _embedding_shape(call: Replaced) -> Tensor:
    return call.weight.new_empty(call.x.shape[0], call.weight.shape[1])


def _linear_shape(call: Replaced) -> Tensor:
    return call.x.new_empty(call.x.shape[0], call.weight.shape[0])


embedding = operators.define(
    "replaced_embedding", Replaced, reference=reference.embedding, check=check_embedding, shape=_embedding_shape
)
linear = operators.define(
    "replaced_linear", Replaced, reference=reference.linear, check=check_linear, shape=_linear_shape
)
scale_ = operators.define("replaced_scale_", Replaced, reference=reference.scale_, check=check_scale, mutates="x")
