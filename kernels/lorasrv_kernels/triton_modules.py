"""Finds the Triton kernels; imports Triton when the first is asked for, so never on a machine without a GPU."""

import functools
import importlib
import importlib.util
import warnings
from types import ModuleType


@functools.cache
def load(name: str) -> ModuleType | None:
    """The module `name`, which imports Triton; None, and a warning, where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        warnings.warn("Triton is not installed, the slower PyTorch path serves on CUDA", stacklevel=2)
        return None
    return importlib.import_module(name)
