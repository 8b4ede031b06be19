"""Loads the compiled CPU kernels. Knows where they lie; knows none of them by name."""

import ctypes
import functools
import warnings
from pathlib import Path

# imported first: the library takes its OpenMP runtime from torch, which has loaded it by then
import torch  # noqa: F401

PATH = Path(__file__).parent / "_native.so"


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, or None where it was not built; a call through it runs without the GIL.

    A library that is there but cannot be loaded is a warning, and None.
    """
    if not PATH.exists():
        return None
    try:
        return ctypes.CDLL(str(PATH))
    except OSError as error:
        warnings.warn(f"native CPU kernels not loaded, the slower PyTorch path serves: {error}", stacklevel=2)
        return None
