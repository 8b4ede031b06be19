"""Calls the native row-wise kernels. Knows their C interface; argument checks are the ops'."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorasrv_kernels.cpu import library
from lorasrv_kernels.cpu.isa import Isa, isa_in_use
from lorasrv_kernels.rowwise.reference import RmsNorm, RmsNormGrad, Rotate, SiluMul, SiluMulGrad

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64
_KIND = (ctypes.c_int32, ctypes.c_int32)
_SILU_ARGUMENTS = (_POINTER, _INTEGER, _POINTER, _INTEGER, _POINTER, _INTEGER, _INTEGER, *_KIND)
_NORM_ARGUMENTS = (*(_POINTER, _INTEGER, _INTEGER), _POINTER, ctypes.c_float, _POINTER, *[_INTEGER] * 3, *_KIND)
_SILU_GRAD_ARGUMENTS = (_POINTER, *[_POINTER, _INTEGER] * 2, _POINTER, _INTEGER, _INTEGER, *_KIND)
_NORM_GRAD_ARGUMENTS = (*[_POINTER] * 3, ctypes.c_float, _POINTER, _INTEGER, _INTEGER, *_KIND)
_ROTATE_ARGUMENTS = (_POINTER, _INTEGER, _INTEGER, _POINTER, _INTEGER, _INTEGER, _INTEGER, *_KIND)


def rms_norm(call: RmsNorm, *, isa: Isa | None = None) -> Tensor | None:
    """The norm, as `lorasrv_kernels.rowwise.rms_norm` states it.

    Args:
        call: the arguments of the op.
        isa: one that the machine must have; None for the one in use.

    Returns:
        The shape of x; None where there is no native version: library not built, or neither float32 nor bfloat16.
    """
    x, weight, epsilon = call
    functions, dtype = _functions(), _DTYPES.get(x.dtype)
    if functions is None or dtype is None:
        return None
    out = x.new_empty(x.shape)
    isa = isa_in_use() if isa is None else isa
    if x.stride(-1) != 1:
        x = x.contiguous()
    num_heads, head_stride = (x.shape[1], x.stride(1)) if x.ndim == 3 else (1, 0)
    place = (x.data_ptr(), x.stride(0), head_stride, None if weight is None else weight.data_ptr())
    functions[2](*place, epsilon, out.data_ptr(), x.shape[0], num_heads, x.shape[-1], dtype, isa)
    return out


def rotate_(call: Rotate, *, isa: Isa | None = None) -> bool:
    """The rotation in place, as `lorasrv_kernels.rowwise.rotate_` states it, with the reference's own bits.

    Args:
        call: the arguments of the op.
        isa: one that the machine must have; None for the one in use.

    Returns:
        False, and heads untouched, where there is no native version: library not built, neither float32 nor bfloat16,
        or heads that are not contiguous.
    """
    heads, angles = call
    functions, dtype = _functions(), _DTYPES.get(heads.dtype)
    if functions is None or dtype is None or heads.stride(2) != 1:
        return False
    isa = isa_in_use() if isa is None else isa
    angles = angles.contiguous()
    num_rows, num_heads, size = heads.shape
    place = (heads.data_ptr(), heads.stride(0), heads.stride(1), angles.data_ptr())
    functions[0](*place, num_rows, num_heads, size // 2, dtype, isa)
    return True


def silu_mul(call: SiluMul, *, isa: Isa | None = None) -> Tensor | None:
    """The gated activation, as `lorasrv_kernels.rowwise.silu_mul` states it.

    Args:
        call: the arguments of the op.
        isa: one that the machine must have; None for the one in use.

    Returns:
        [T, I]; None where there is no native version: library not built, or neither float32 nor bfloat16.
    """
    gate, up = call
    functions, dtype = _functions(), _DTYPES.get(gate.dtype)
    if functions is None or dtype is None:
        return None
    isa = isa_in_use() if isa is None else isa
    gate, up = (part if part.stride(1) == 1 else part.contiguous() for part in (gate, up))
    out = torch.empty(gate.shape, dtype=gate.dtype)
    rows = (gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), out.data_ptr())
    functions[1](*rows, *gate.shape, dtype, isa)
    return out


def rms_norm_grad(call: RmsNormGrad, *, isa: Isa | None = None) -> Tensor | None:
    """The gradient, as `lorasrv_kernels.rowwise.rms_norm_grad` states it.

    Args:
        call: the arguments of the op.
        isa: one that the machine must have; None for the one in use.

    Returns:
        Of the shape of x; None where there is no native version: library not built, or neither float32 nor bfloat16.
    """
    grad, x, weight, epsilon = call
    function, dtype = _function("lorasrv_rms_norm_grad", _NORM_GRAD_ARGUMENTS), _DTYPES.get(x.dtype)
    if function is None or dtype is None:
        return None
    isa = isa_in_use() if isa is None else isa
    grad, x = grad.contiguous(), x.contiguous()
    out, count = torch.empty_like(x), x.shape[-1]
    place = None if weight is None else weight.data_ptr()
    num_rows = x.numel() // max(1, count)
    function(grad.data_ptr(), x.data_ptr(), place, epsilon, out.data_ptr(), num_rows, count, dtype, isa)
    return out


def silu_mul_grad(call: SiluMulGrad, *, isa: Isa | None = None) -> Tensor | None:
    """The gradients, as `lorasrv_kernels.rowwise.silu_mul_grad` states them.

    Args:
        call: the arguments of the op.
        isa: one that the machine must have; None for the one in use.

    Returns:
        [T, 2 I]; None where there is no native version: library not built, or neither float32 nor bfloat16.
    """
    grad, gate, up = call
    function, dtype = _function("lorasrv_silu_mul_grad", _SILU_GRAD_ARGUMENTS), _DTYPES.get(gate.dtype)
    if function is None or dtype is None:
        return None
    isa = isa_in_use() if isa is None else isa
    grad = grad.contiguous()
    gate, up = (part if part.stride(1) == 1 else part.contiguous() for part in (gate, up))
    out = gate.new_empty(len(gate), 2 * gate.shape[1])
    rows = (gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), out.data_ptr())
    function(grad.data_ptr(), *rows, *gate.shape, dtype, isa)
    return out


@functools.cache
def _functions() -> tuple[Callable[..., None], Callable[..., None], Callable[..., None]] | None:
    rotate = library.function("lorasrv_rotate", _ROTATE_ARGUMENTS)
    silu = library.function("lorasrv_silu_mul", _SILU_ARGUMENTS)
    norm = library.function("lorasrv_rms_norm", _NORM_ARGUMENTS)
    return None if rotate is None or silu is None or norm is None else (rotate, silu, norm)


@functools.cache
def _function(name: str, arguments: tuple[Any, ...]) -> Callable[..., None] | None:
    return library.function(name, arguments)
