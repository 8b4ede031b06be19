"""Norms and the gated activation with gradients that keep their input alone, and results that are computed again.

Autograd's own would keep what lies between, in float32. Knows no layer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lorasrv_kernels import rowwise
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root mean square norm over the last dimension, in float32 inside, as the model serves it.

    Differentiable in x, [T, I] or [T, H, I]; the weight, [I], gets no gradient.
    """
    result: Tensor = _Norm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return result


def gated_activation(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, differentiable. gate_up: [T, 2 I], gate first. Returns [T, I]."""
    result: Tensor = _GatedActivation.apply(gate_up)  # type: ignore[no-untyped-call]
    return result


@contextmanager
def recomputed(result: Tensor, compute: Callable[[], Tensor]) -> Iterator[None]:
    """Inside, what autograd would keep `result` for calls `compute` instead, on the way back."""
    # not the result itself, which would live as long as autograd keeps the hooks
    place, shape = result.data_ptr(), result.shape

    def pack(saved: Tensor) -> object:
        return compute if saved.data_ptr() == place and saved.shape == shape else saved

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            again: Tensor = kept()
        return again

    with saved_tensors_hooks(pack, unpack):
        yield


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return rowwise.rms_norm(x, weight, epsilon)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        return rowwise.rms_norm_grad(upstream[0], x, weight, ctx.epsilon), None, None


class _GatedActivation(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return rowwise.silu_mul(*gate_up.chunk(2, dim=1))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return rowwise.silu_mul_grad(upstream[0], *gate_up.chunk(2, dim=1))
