"""Instruction sets that the native kernels have versions for. Knows their numbers and which this machine has."""

import functools
from enum import IntEnum

from lorasrv_kernels.cpu import library


class Isa(IntEnum):
    """In order of width; a machine that has one has those before it. The numbers are those of `cpu/isa.h`."""

    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3


@functools.cache
def widest_isa() -> Isa | None:
    """The widest instruction set of this machine; None where the native library is not built."""
    native = library.load()
    return None if native is None else Isa(native.lorasrv_cpu_isa())
