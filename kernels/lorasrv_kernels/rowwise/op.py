"""Contract of the row-wise ops: schemas, checks, the default implementation and that for CPU."""

import torch
from torch import Tensor

from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.rowwise import native, reference

_library = torch.library.Library("lorasrv", "FRAGMENT")
_library.define("rotate_(Tensor(a!) heads, Tensor angles) -> ()")
_library.define("silu_mul(Tensor gate, Tensor up) -> Tensor")


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


_library.impl("rotate_", _rotate, "CompositeExplicitAutograd")
_library.impl("rotate_", _rotate_cpu, "CPU")
_library.impl("rotate_", check_rotate, "Meta")
_library.impl("silu_mul", _silu_mul, "CompositeExplicitAutograd")
_library.impl("silu_mul", _silu_mul_cpu, "CPU")
_library.impl("silu_mul", check_silu_mul, "Meta")
