"""Which instruction set the native CPU kernels use: the widest this machine has, or the one this process was told.

Knows the names and numbers of the C interface (`isa.h`); knows no kernel. The choice is the process's, because an op
has one CPU implementation: it is made once, before the first request.
"""

import ctypes
import functools
from enum import IntEnum

from lorasrv_kernels.cpu import library
from lorasrv_kernels.errors import KernelError


class Isa(IntEnum):
    """In order of width; a machine that has one has those before it. The numbers are those of `cpu/isa.h`."""

    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3
    AMX = 4
    # tiles in software, for tests: wherever AVX512_BF16 is; no machine reports it, so it cannot be chosen
    AMX_EMULATED = 5


class _Choice:
    forced: Isa | None = None


_choice = _Choice()


def force_isa(name: str | None) -> None:
    """Makes every native kernel of this process use one instruction set, named in lower case; None for the widest.

    One path serves every number of tokens, so bits can be compared only under one choice. Without the native library
    nothing changes.

    Raises:
        KernelError: No such instruction set, or this machine lacks it.
    """
    machine = widest_isa()
    usable = [isa.name.lower() for isa in Isa if machine is None or isa <= machine]
    if name is not None and name not in usable:
        raise KernelError(f"CPU instruction set must be one of {', '.join(usable)} on this machine, got {name!r}")
    _choice.forced = None if name is None else Isa[name.upper()]


def forced_isa() -> Isa | None:
    """What `force_isa` was told."""
    return _choice.forced


@functools.cache
def widest_isa() -> Isa | None:
    """The widest instruction set of this machine; None where the native library is not built."""
    function = library.function("lorasrv_cpu_isa", [], ctypes.c_int32)
    return None if function is None else Isa(function())


def isa_in_use() -> Isa | None:
    """The instruction set that kernels use; None where the native library is not built."""
    machine = widest_isa()
    return machine if machine is None or _choice.forced is None else _choice.forced
