"""Loads the compiled CPU kernels. Knows where they lie; knows none of them by name."""

import ctypes
import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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


def function(name: str, arguments: Sequence[Any], result: Any = None) -> Callable[..., Any] | None:
    """A function of the library with its C types, or None where it cannot be had.

    A library that lacks the function was built from other sources: a warning that names the remedy, and None.
    """
    native = load()
    if native is None:
        return None
    found: Callable[..., Any] | None = getattr(native, name, None)
    if found is None:
        warnings.warn(
            f"native CPU kernels lack {name}, the slower PyTorch path serves: run `make native`", stacklevel=2
        )
        return None
    found.argtypes, found.restype = list(arguments), result  # type: ignore[attr-defined]
    return found
