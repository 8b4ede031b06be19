"""Contract of the batched low-rank update: schemas, checks and the default implementation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorasrv_kernels import triton_modules
from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.lora import native, reference
from lorasrv_kernels.table import Column

_library = torch.library.Library("lorasrv", "FRAGMENT")
_library.define(
    "lora_apply_(Tensor(a!) y, Tensor x, Tensor arena, Tensor table, int[] out_features, "
    "Tensor rows, Tensor weights, Tensor tile_slots, Tensor tile_starts, Tensor base_rows, Tensor? bias, "
    "int max_rank=0, bool composed=False, bool exact=True) -> ()"
)
_library.define(
    "lora_embed_(Tensor(a!) y, Tensor tokens, Tensor arena, Tensor table, "
    "Tensor rows, Tensor weights, Tensor tile_slots, Tensor tile_starts, Tensor base_rows, "
    "bool composed=False, bool exact=True) -> ()"
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
    composed: bool = False,
    exact: bool = True,
) -> None:
    """Raises KernelError naming every argument that breaks the contract of `lora_apply_`."""
    del composed, exact
    width = sum(out_features)
    wrong = []
    if x.ndim != 2:
        wrong.append(f"x must be [T, I], got {list(x.shape)}")
    if y.shape != (x.shape[0], width):
        wrong.append(f"y must be {[x.shape[0], width]}, got {list(y.shape)}")
    if y.dtype != x.dtype:
        wrong.append(f"y and x must have one dtype, got {y.dtype} and {x.dtype}")
    if table.ndim != 3 or table.shape[1] != len(out_features):
        wrong.append(f"table must be [S, {len(out_features)}, {len(Column)}], got {list(table.shape)}")
    if bias is not None and (bias.shape != (width,) or bias.dtype != y.dtype):
        wrong.append(f"bias must be {y.dtype} [{width}], got {bias.dtype} {list(bias.shape)}")
    if max_rank < 0:
        wrong.append(f"max_rank must not be negative, got {max_rank}")
    wrong += _wrong_slots(arena, table, y.dtype, rows, weights, tile_slots, tile_starts, base_rows)
    if wrong:
        raise KernelError("lora_apply_: " + "; ".join(wrong))


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
    composed: bool = False,
    exact: bool = True,
) -> None:
    """Raises KernelError naming every argument that breaks the contract of `lora_embed_`."""
    del composed, exact
    wrong = []
    if tokens.ndim != 1 or tokens.dtype != torch.int64:
        wrong.append(f"tokens must be int64 [T], got {list(tokens.shape)}")
    if y.ndim != 2 or y.shape[0] != tokens.shape[0]:
        wrong.append(f"y must be [{tokens.shape[0]}, O], got {list(y.shape)}")
    if table.ndim != 2:
        wrong.append(f"table must be [S, {len(Column)}], got {list(table.shape)}")
    wrong += _wrong_slots(arena, table, y.dtype, rows, weights, tile_slots, tile_starts, base_rows)
    if wrong:
        raise KernelError("lora_embed_: " + "; ".join(wrong))


def _wrong_slots(
    arena: Tensor,
    table: Tensor,
    dtype: torch.dtype,
    rows: Tensor,
    weights: Tensor,
    tile_slots: Tensor,
    tile_starts: Tensor,
    base_rows: Tensor,
) -> list[str]:
    wrong = []
    if arena.ndim != 1 or arena.dtype != dtype:
        wrong.append(f"arena must be 1-D {dtype}, got {arena.ndim}-D {arena.dtype}")
    if table.dtype != torch.int64 or table.shape[-1] != len(Column):
        wrong.append(f"table must be int64 with {len(Column)} columns, got {table.dtype} {list(table.shape)}")
    if rows.shape != weights.shape or rows.dtype != torch.int64:
        wrong.append("rows int64 [E] and weights [E] must agree")
    if len(tile_starts) != len(tile_slots) + 1:
        wrong.append("tile_starts must be [K + 1] for tile_slots [K]")
    if base_rows.ndim != 1 or base_rows.dtype != torch.int64:
        wrong.append("base_rows must be int64 [T']")
    return wrong


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
    composed: bool = False,
    exact: bool = True,
) -> None:
    del composed, exact
    check_apply(y, x, arena, table, out_features, rows, weights, tile_slots, tile_starts, base_rows, bias, max_rank)
    reference.lora_apply_(y, x, arena, table, out_features, rows, weights, tile_slots, tile_starts, base_rows, bias)


def _apply_cpu(
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
    composed: bool = False,
    exact: bool = True,
) -> None:
    del composed, exact
    check_apply(y, x, arena, table, out_features, rows, weights, tile_slots, tile_starts, base_rows, bias, max_rank)
    arguments = (y, x, arena, table, out_features, rows, weights, tile_slots, tile_starts, base_rows, bias)
    if not native.lora_apply_(*arguments):
        reference.lora_apply_(*arguments)


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
    composed: bool = False,
    exact: bool = True,
) -> None:
    del composed, exact
    check_embed(y, tokens, arena, table, rows, weights, tile_slots, tile_starts, base_rows)
    reference.lora_embed_(y, tokens, arena, table, rows, weights, tile_slots, tile_starts)


def _apply_cuda(
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
    composed: bool = False,
    exact: bool = True,
) -> None:
    kernels = triton_modules.load("lorasrv_kernels.lora.triton_kernels")
    apply = _apply if kernels is None else kernels.lora_apply_
    check_apply(y, x, arena, table, out_features, rows, weights, tile_slots, tile_starts, base_rows, bias, max_rank)
    slots = (rows, weights, tile_slots, tile_starts, base_rows)
    with torch.cuda.device_of(y):
        apply(y, x, arena, table, out_features, *slots, bias, max_rank, composed, exact)


def _embed_cuda(
    y: Tensor,
    tokens: Tensor,
    arena: Tensor,
    table: Tensor,
    rows: Tensor,
    weights: Tensor,
    tile_slots: Tensor,
    tile_starts: Tensor,
    base_rows: Tensor,
    composed: bool = False,
    exact: bool = True,
) -> None:
    kernels = triton_modules.load("lorasrv_kernels.lora.triton_kernels")
    embed = _embed if kernels is None else kernels.lora_embed_
    check_embed(y, tokens, arena, table, rows, weights, tile_slots, tile_starts, base_rows)
    with torch.cuda.device_of(y):
        embed(y, tokens, arena, table, rows, weights, tile_slots, tile_starts, base_rows, composed, exact)


_library.impl("lora_apply_", _apply, "CompositeExplicitAutograd")
_library.impl("lora_apply_", _apply_cpu, "CPU")
_library.impl("lora_apply_", _apply_cuda, "CUDA")
_library.impl("lora_apply_", check_apply, "Meta")
_library.impl("lora_embed_", _embed, "CompositeExplicitAutograd")
_library.impl("lora_embed_", _embed_cuda, "CUDA")
_library.impl("lora_embed_", check_embed, "Meta")
