"""Contract of the trainable low-rank update: checks, shapes, gradient, and who serves."""

from typing import Any

import torch
from torch import Tensor

from lorasrv_kernels import operators
from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.lora.training import native, reference
from lorasrv_kernels.lora.training.reference import Gradients, LoraUpdate, LoraUpdateGrad


def check_update(call: LoraUpdate) -> None:
    """Raises KernelError naming every argument that breaks the contract of `lora_update`."""
    y, x, a, b, d, scales, out_features, segment_tokens = call
    wrong = []
    if x.ndim != 2 or sum(segment_tokens) != x.shape[0] or min(segment_tokens, default=0) < 0:
        wrong.append(f"x must be [T, I], T the sum of {list(segment_tokens)}, got {list(x.shape)}")
    if y.ndim != 2 or y.shape[0] != x.shape[0] or y.shape[1] != sum(out_features) or y.dtype != x.dtype:
        expected = f"{x.dtype} [{x.shape[0]}, {sum(out_features)}]"
        wrong.append(f"y must be {expected}, got {y.dtype} {list(y.shape)}")
    count = len(segment_tokens) * len(out_features)
    if {len(a), len(b), len(d), len(scales)} != {count}:
        lengths = f"{len(a)}, {len(b)}, {len(d)}, {len(scales)}"
        wrong.append(f"a, b, d and scales must have {count} entries each, one per segment and slice, got {lengths}")
    elif x.ndim == 2:
        for index in range(count):
            width = out_features[index % len(out_features)]
            wrong += _wrong_factors(index, a[index], b[index], d[index], x, width)
    if wrong:
        raise KernelError("lora_update: " + "; ".join(wrong))


def _wrong_factors(index: int, a: Tensor, b: Tensor, d: Tensor, x: Tensor, width: int) -> list[str]:
    dtype = reference.sum_dtype(x.dtype)
    rank = a.shape[0] if a.ndim else 0
    expected = [("a", a, (rank, x.shape[1])), ("b", b, (width, rank)), ("d", d, (width if d.numel() else 0,))]
    return [
        f"{name}[{index}] must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
        for name, tensor, shape in expected
        if tensor.shape != shape or tensor.dtype != dtype
    ]


def _grad_shape(call: LoraUpdateGrad) -> Gradients:
    grad, x = call.grad, call.x
    return (
        grad.new_empty(grad.shape if reference.any_d(call.d) else (0, grad.shape[1])),
        x.new_empty(x.shape),
        [tensor.new_empty(tensor.shape) for tensor in call.a],
        [tensor.new_empty(tensor.shape) for tensor in call.b],
        [tensor.new_empty(tensor.shape) for tensor in call.d],
    )


def _not_double(call: LoraUpdate | LoraUpdateGrad) -> bool:
    return call.x.dtype != torch.float64


lora_update = operators.define(
    "lora_update",
    LoraUpdate,
    reference=reference.lora_update,
    check=check_update,
    shape=operators.like_first,
    cpu=native.lora_update,
    cuda=operators.in_triton(f"{__package__}.triton_kernels", "lora_update", reference.lora_update, serves=_not_double),
)
lora_update_grad = operators.define(
    "lora_update_grad",
    LoraUpdateGrad,
    reference=reference.lora_update_grad,
    shape=_grad_shape,
    cpu=native.lora_update_grad,
    cuda=operators.in_triton(
        f"{__package__}.triton_gradient", "lora_update_grad", reference.lora_update_grad, serves=_not_double
    ),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    y, x, a, b, d, *ctx.sizes = inputs
    ctx.count = len(a)
    ctx.save_for_backward(x, *a, *b, *d, *([y] if reference.any_d(d) else []))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *saved = ctx.saved_tensors
    a, b, d, rest = (saved[part * ctx.count : (part + 1) * ctx.count] for part in range(4))
    y = rest[0] if rest else None
    grad_y, grad_x, grad_a, grad_b, grad_d = lora_update_grad(grad, y, x, a, b, d, *ctx.sizes)
    return grad if y is None else grad_y, grad_x, grad_a, grad_b, grad_d, None, None, None


torch.library.register_autograd("lorasrv::lora_update", _backward, setup_context=_setup_context, lib=operators.library)
