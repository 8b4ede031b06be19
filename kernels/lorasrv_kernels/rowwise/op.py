"""Contract of the row-wise ops: schemas, checks, the default implementation and those for CUDA and CPU."""

from typing import Any

import torch
from torch import Tensor

from lorasrv_kernels import triton_modules
from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.rowwise import native, reference

_library = torch.library.Library("lorasrv", "FRAGMENT")
_library.define("rms_norm(Tensor x, Tensor? weight, float epsilon) -> Tensor")
_library.define("rotate_(Tensor(a!) heads, Tensor angles) -> ()")
_library.define("silu_mul(Tensor gate, Tensor up) -> Tensor")


def check_norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """Raises KernelError naming every argument that breaks the contract of `rms_norm`; the result is unset."""
    wrong = []
    if x.ndim not in (2, 3) or not x.is_floating_point():
        wrong.append(f"x must be floating [T, I] or [T, H, I], got {x.dtype} {list(x.shape)}")
    elif weight is not None and (weight.shape != x.shape[-1:] or weight.dtype != x.dtype or not weight.is_contiguous()):
        expected = f"contiguous {x.dtype} {list(x.shape[-1:])}"
        wrong.append(f"weight must be {expected}, got {weight.dtype} {list(weight.shape)}")
    if not epsilon >= 0:
        wrong.append(f"epsilon must be at least 0, got {epsilon}")
    if wrong:
        raise KernelError("rms_norm: " + "; ".join(wrong))
    return x.new_empty(x.shape)


def check_rotate(heads: Tensor, angles: Tensor) -> None:
    """Raises KernelError naming every argument that breaks the contract of `rotate_`."""
    if heads.ndim != 3 or heads.shape[2] % 2:
        raise KernelError(f"rotate_: heads must be [T, H, D] with D even, got {list(heads.shape)}")
    expected = (heads.shape[0], 1, heads.shape[2])
    if angles.shape != expected or angles.dtype != torch.float32:
        raise KernelError(f"rotate_: angles must be float32 {list(expected)}, got {angles.dtype} {list(angles.shape)}")


def check_silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Raises KernelError naming every argument that breaks the contract of `silu_mul`; the result is unset."""
    if gate.ndim != 2 or gate.shape != up.shape or gate.dtype != up.dtype:
        raise KernelError(
            f"silu_mul: gate and up must be one shape [T, I] and dtype, got {gate.dtype} {list(gate.shape)} and "
            f"{up.dtype} {list(up.shape)}"
        )
    return gate.new_empty(gate.shape)


def _norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    check_norm(x, weight, epsilon)
    return reference.rms_norm(x, weight, epsilon)


def _kernels() -> Any:
    """The Triton kernels, or the reference where there is no Triton."""
    return triton_modules.load("lorasrv_kernels.rowwise.triton_kernels") or reference


def _norm_cuda(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    check_norm(x, weight, epsilon)
    with torch.cuda.device_of(x):
        result: Tensor = _kernels().rms_norm(x, weight, epsilon)
    return result


def _rotate_cuda(heads: Tensor, angles: Tensor) -> None:
    check_rotate(heads, angles)
    with torch.cuda.device_of(heads):
        _kernels().rotate_(heads, angles)


def _silu_mul_cuda(gate: Tensor, up: Tensor) -> Tensor:
    check_silu_mul(gate, up)
    with torch.cuda.device_of(gate):
        result: Tensor = _kernels().silu_mul(gate, up)
    return result


def _norm_cpu(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    out = check_norm(x, weight, epsilon)
    return out if native.rms_norm_(x, weight, epsilon, out) else reference.rms_norm(x, weight, epsilon)


def _rotate(heads: Tensor, angles: Tensor) -> None:
    check_rotate(heads, angles)
    reference.rotate_(heads, angles)


def _rotate_cpu(heads: Tensor, angles: Tensor) -> None:
    check_rotate(heads, angles)
    if not native.rotate_(heads, angles):
        reference.rotate_(heads, angles)


def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    check_silu_mul(gate, up)
    return reference.silu_mul(gate, up)


def _silu_mul_cpu(gate: Tensor, up: Tensor) -> Tensor:
    check_silu_mul(gate, up)
    out = native.silu_mul(gate, up)
    return reference.silu_mul(gate, up) if out is None else out


_library.impl("rms_norm", _norm, "CompositeExplicitAutograd")
_library.impl("rms_norm", _norm_cuda, "CUDA")
_library.impl("rms_norm", _norm_cpu, "CPU")
_library.impl("rms_norm", check_norm, "Meta")
_library.impl("rotate_", _rotate, "CompositeExplicitAutograd")
_library.impl("rotate_", _rotate_cuda, "CUDA")
_library.impl("rotate_", _rotate_cpu, "CPU")
_library.impl("rotate_", check_rotate, "Meta")
_library.impl("silu_mul", _silu_mul, "CompositeExplicitAutograd")
_library.impl("silu_mul", _silu_mul_cuda, "CUDA")
_library.impl("silu_mul", _silu_mul_cpu, "CPU")
_library.impl("silu_mul", check_silu_mul, "Meta")
