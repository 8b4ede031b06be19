"""What the native linear layers share: which instruction set serves, and scratch memory.

Knows the C interface of `linear.cpp`; knows nothing of how weights are stored.
"""

import ctypes
import functools

import torch
from torch import Tensor

from lorasrv_kernels.cpu import library
from lorasrv_kernels.cpu.isa import Isa, forced_isa, isa_in_use
from lorasrv_kernels.workspace import thread_workspace

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Numbers of the C interface."""

GRANULE = 64
"""The native kernels take in-features that are multiples of this."""


def serving_isa() -> Isa | None:
    """The instruction set the linear layers use; None where the reference serves.

    Portable code serves only where it is forced: vector libraries behind PyTorch are faster.
    """
    isa = isa_in_use()
    return None if isa is Isa.PORTABLE and forced_isa() is None else isa


def scratch(tokens: int, in_features: int, dtype: int, isa: Isa, threads: int) -> Tensor:
    """Scratch memory for a call: [bytes] uint8."""
    return shared_scratch(tokens, (in_features,), dtype, isa, threads)


def shared_scratch(tokens: int, in_features: tuple[int, ...], dtype: int, isa: Isa, threads: int) -> Tensor:
    """Scratch memory for calls that follow each other, each with one of several in-features: [bytes] uint8."""
    num_bytes = _scratch_bytes(tokens, in_features, dtype, isa, threads)
    return thread_workspace().take("native.linear", (num_bytes,), torch.uint8, torch.device("cpu"))


@functools.lru_cache(maxsize=4096)
def _scratch_bytes(tokens: int, in_features: tuple[int, ...], dtype: int, isa: Isa, threads: int) -> int:
    arguments = [ctypes.c_int64] * 2 + [ctypes.c_int32] * 3
    function = library.function("lorasrv_linear_scratch", arguments, ctypes.c_int64)
    assert function is not None, "the caller has found a kernel in the library"
    return max(int(function(tokens, width, dtype, isa, threads)) for width in in_features)
