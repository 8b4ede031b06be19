"""Contract of the batched low-rank update: checks, and who serves."""

import torch

from lorasrv_kernels import operators
from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.lora import native, reference
from lorasrv_kernels.lora.reference import LoraApply, LoraEmbed
from lorasrv_kernels.table import Column


def check_apply(call: LoraApply) -> None:
    """Raises KernelError naming every argument that breaks the contract of `lora_apply_`."""
    y, x, table, bias, out_features = call.y, call.x, call.table, call.bias, call.out_features
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
    if call.max_rank < 0:
        wrong.append(f"max_rank must not be negative, got {call.max_rank}")
    wrong += _wrong_slots(call)
    if wrong:
        raise KernelError("lora_apply_: " + "; ".join(wrong))


def check_embed(call: LoraEmbed) -> None:
    """Raises KernelError naming every argument that breaks the contract of `lora_embed_`."""
    y, tokens, table = call.y, call.tokens, call.table
    wrong = []
    if tokens.ndim != 1 or tokens.dtype != torch.int64:
        wrong.append(f"tokens must be int64 [T], got {list(tokens.shape)}")
    if y.ndim != 2 or y.shape[0] != tokens.shape[0]:
        wrong.append(f"y must be [{tokens.shape[0]}, O], got {list(y.shape)}")
    if table.ndim != 2:
        wrong.append(f"table must be [S, {len(Column)}], got {list(table.shape)}")
    wrong += _wrong_slots(call)
    if wrong:
        raise KernelError("lora_embed_: " + "; ".join(wrong))


def _wrong_slots(call: LoraApply | LoraEmbed) -> list[str]:
    arena, table, dtype = call.arena, call.table, call.y.dtype
    wrong = []
    if arena.ndim != 1 or arena.dtype != dtype:
        wrong.append(f"arena must be 1-D {dtype}, got {arena.ndim}-D {arena.dtype}")
    if table.dtype != torch.int64 or table.shape[-1] != len(Column):
        wrong.append(f"table must be int64 with {len(Column)} columns, got {table.dtype} {list(table.shape)}")
    if call.rows.shape != call.weights.shape or call.rows.dtype != torch.int64:
        wrong.append("rows int64 [E] and weights [E] must agree")
    if len(call.tile_starts) != len(call.tile_slots) + 1:
        wrong.append("tile_starts must be [K + 1] for tile_slots [K]")
    if call.base_rows.ndim != 1 or call.base_rows.dtype != torch.int64:
        wrong.append("base_rows must be int64 [T']")
    return wrong


_TRITON = f"{__package__}.triton_kernels"
lora_apply_ = operators.define(
    "lora_apply_",
    LoraApply,
    reference=reference.lora_apply_,
    check=check_apply,
    mutates="y",
    cpu=native.lora_apply_,
    cuda=operators.in_triton(_TRITON, "lora_apply_", reference.lora_apply_),
)
lora_embed_ = operators.define(
    "lora_embed_",
    LoraEmbed,
    reference=reference.lora_embed_,
    check=check_embed,
    mutates="y",
    cuda=operators.in_triton(_TRITON, "lora_embed_", reference.lora_embed_),
)
