"""Contract of the trainable low-rank update: schemas, checks, default implementations, gradient."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lorasrv_kernels import triton_modules
from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.lora.training import native, reference
from lorasrv_kernels.lora.training.reference import Gradients

_ADAPTERS = "Tensor[] a, Tensor[] b, Tensor[] d, float[] scales, int[] out_features, int[] segment_tokens"
_library = torch.library.Library("lorasrv", "FRAGMENT")
_library.define(f"lora_update(Tensor y, Tensor x, {_ADAPTERS}) -> Tensor")
_library.define(
    f"lora_update_grad(Tensor grad, Tensor? y, Tensor x, {_ADAPTERS}) -> (Tensor, Tensor, Tensor[], Tensor[], Tensor[])"
)


def check_update(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    d: Sequence[Tensor],
    scales: Sequence[float],
    out_features: Sequence[int],
    segment_tokens: Sequence[int],
) -> None:
    """Raises KernelError naming every argument that breaks the contract of `lora_update`."""
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


def _update(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    d: Sequence[Tensor],
    scales: Sequence[float],
    out_features: Sequence[int],
    segment_tokens: Sequence[int],
) -> Tensor:
    check_update(y, x, a, b, d, scales, out_features, segment_tokens)
    return reference.lora_update(y, x, a, b, d, scales, out_features, segment_tokens)


def _update_cpu(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    d: Sequence[Tensor],
    scales: Sequence[float],
    out_features: Sequence[int],
    segment_tokens: Sequence[int],
) -> Tensor:
    check_update(y, x, a, b, d, scales, out_features, segment_tokens)
    update = native.lora_update if native.serves(x.dtype) else reference.lora_update
    return update(y, x, a, b, d, scales, out_features, segment_tokens)


def _grad(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    d: Sequence[Tensor],
    scales: Sequence[float],
    out_features: Sequence[int],
    segment_tokens: Sequence[int],
) -> Gradients:
    return reference.lora_update_grad(grad, y, x, a, b, d, scales, out_features, segment_tokens)


def _grad_cpu(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    d: Sequence[Tensor],
    scales: Sequence[float],
    out_features: Sequence[int],
    segment_tokens: Sequence[int],
) -> Gradients:
    gradients = native.lora_update_grad if native.serves(x.dtype) else reference.lora_update_grad
    return gradients(grad, y, x, a, b, d, scales, out_features, segment_tokens)


def _update_cuda(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    d: Sequence[Tensor],
    scales: Sequence[float],
    out_features: Sequence[int],
    segment_tokens: Sequence[int],
) -> Tensor:
    check_update(y, x, a, b, d, scales, out_features, segment_tokens)
    update: Callable[..., Tensor] = getattr(_kernels(x), "lora_update", reference.lora_update)
    with torch.cuda.device_of(x):
        return update(y, x, a, b, d, scales, out_features, segment_tokens)


def _grad_cuda(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    d: Sequence[Tensor],
    scales: Sequence[float],
    out_features: Sequence[int],
    segment_tokens: Sequence[int],
) -> Gradients:
    gradients: Callable[..., Gradients] = getattr(_kernels(x), "lora_update_grad", reference.lora_update_grad)
    with torch.cuda.device_of(x):
        return gradients(grad, y, x, a, b, d, scales, out_features, segment_tokens)


def _kernels(x: Tensor) -> ModuleType | None:
    double = x.dtype == torch.float64
    return None if double else triton_modules.load("lorasrv_kernels.lora.training.triton_kernels")


def _update_shape(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    d: Sequence[Tensor],
    scales: Sequence[float],
    out_features: Sequence[int],
    segment_tokens: Sequence[int],
) -> Tensor:
    check_update(y, x, a, b, d, scales, out_features, segment_tokens)
    return y.new_empty(y.shape)


def _grad_shape(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    d: Sequence[Tensor],
    scales: Sequence[float],
    out_features: Sequence[int],
    segment_tokens: Sequence[int],
) -> Gradients:
    del y, scales, out_features, segment_tokens
    return (
        grad.new_empty(grad.shape if reference.any_d(d) else (0, grad.shape[1])),
        x.new_empty(x.shape),
        [tensor.new_empty(tensor.shape) for tensor in a],
        [tensor.new_empty(tensor.shape) for tensor in b],
        [tensor.new_empty(tensor.shape) for tensor in d],
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    y, x, a, b, d, ctx.scales, ctx.out_features, ctx.segment_tokens = inputs
    ctx.count = len(a)
    ctx.save_for_backward(x, *a, *b, *d, *([y] if reference.any_d(d) else []))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *saved = ctx.saved_tensors
    a, b, d, rest = (saved[part * ctx.count : (part + 1) * ctx.count] for part in range(4))
    y = rest[0] if rest else None
    grad_y, grad_x, grad_a, grad_b, grad_d = torch.ops.lorasrv.lora_update_grad(
        grad, y, x, a, b, d, ctx.scales, ctx.out_features, ctx.segment_tokens
    )
    return grad if y is None else grad_y, grad_x, grad_a, grad_b, grad_d, None, None, None


_library.impl("lora_update", _update, "CompositeExplicitAutograd")
_library.impl("lora_update", _update_cpu, "CPU")
_library.impl("lora_update", _update_cuda, "CUDA")
_library.impl("lora_update", _update_shape, "Meta")
_library.impl("lora_update_grad", _grad, "CompositeExplicitAutograd")
_library.impl("lora_update_grad", _grad_cpu, "CPU")
_library.impl("lora_update_grad", _grad_cuda, "CUDA")
_library.impl("lora_update_grad", _grad_shape, "Meta")
torch.library.register_autograd("lorasrv::lora_update", _backward, setup_context=_setup_context, lib=_library)
