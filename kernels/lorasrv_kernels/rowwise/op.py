"""Contract of the row-wise ops: checks, and who serves."""

import torch

from lorasrv_kernels import operators
from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.rowwise import native, reference
from lorasrv_kernels.rowwise.reference import RmsNorm, Rotate, SiluMul


def check_norm(call: RmsNorm) -> None:
    """Raises KernelError naming every argument that breaks the contract of `rms_norm`."""
    x, weight, epsilon = call
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


def check_rotate(call: Rotate) -> None:
    """Raises KernelError naming every argument that breaks the contract of `rotate_`."""
    heads, angles = call
    if heads.ndim != 3 or heads.shape[2] % 2:
        raise KernelError(f"rotate_: heads must be [T, H, D] with D even, got {list(heads.shape)}")
    expected = (heads.shape[0], 1, heads.shape[2])
    if angles.shape != expected or angles.dtype != torch.float32:
        raise KernelError(f"rotate_: angles must be float32 {list(expected)}, got {angles.dtype} {list(angles.shape)}")


def check_silu_mul(call: SiluMul) -> None:
    """Raises KernelError naming every argument that breaks the contract of `silu_mul`."""
    gate, up = call
    if gate.ndim != 2 or gate.shape != up.shape or gate.dtype != up.dtype:
        raise KernelError(
            f"silu_mul: gate and up must be one shape [T, I] and dtype, got {gate.dtype} {list(gate.shape)} and "
            f"{up.dtype} {list(up.shape)}"
        )


_TRITON = f"{__package__}.triton_kernels"
rms_norm = operators.define(
    "rms_norm",
    RmsNorm,
    reference=reference.rms_norm,
    check=check_norm,
    shape=operators.like_first,
    cpu=native.rms_norm,
    cuda=operators.in_triton(_TRITON, "rms_norm", reference.rms_norm),
)
rotate_ = operators.define(
    "rotate_",
    Rotate,
    reference=reference.rotate_,
    check=check_rotate,
    mutates="heads",
    cpu=native.rotate_,
    cuda=operators.in_triton(_TRITON, "rotate_", reference.rotate_),
)
silu_mul = operators.define(
    "silu_mul",
    SiluMul,
    reference=reference.silu_mul,
    check=check_silu_mul,
    shape=operators.like_first,
    cpu=native.silu_mul,
    cuda=operators.in_triton(_TRITON, "silu_mul", reference.silu_mul),
)
