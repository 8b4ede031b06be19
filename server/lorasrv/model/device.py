"""What "auto" means on this machine for device and dtype. Looks at the machine when asked, never at import."""

import os

import torch

from lorasrv.errors import ConfigError

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def resolve_device(name: str) -> torch.device:
    """Returns the device for "auto", "cpu" or "cuda".

    Raises:
        ConfigError: it is not here.
    """
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigError(["device is cuda, but PyTorch finds no CUDA device here; take cpu or auto"])
    return torch.device("cuda:0" if has_cuda and name != "cpu" else "cpu")


def total_memory(device: torch.device) -> int:
    """Returns the bytes of memory a device has; of a CPU, those of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of activations for "auto" or a dtype's name."""
    if name != "auto":
        return _DTYPES[name]
    # a CPU without bfloat16 instructions multiplies it many times slower than float32
    has_bfloat16 = device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32
