"""What "auto" means on this machine: the instruction set, and memory for the KV cache and the adapters.

Looks at the machine when asked, never at import. Knows the model's sizes; knows no request.
"""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from lorasrv_kernels.cpu.isa import force_isa
from lorasrv_kernels.errors import KernelError

from lorasrv.engine.kv_cache import num_blocks_for
from lorasrv.engine.memory import DeviceMemory, image_elements
from lorasrv.errors import ConfigError
from lorasrv.model.decoder import DecoderModel

# of the memory that is free when the KV cache is sized
_KV_SHARE = 0.25
_NUM_LARGEST_ADAPTERS = 8


def choose_cpu_isa(name: str) -> None:
    """Sets the instruction set of this process's native kernels; "auto" is the widest.

    Raises:
        ConfigError: the machine does not have it.
    """
    try:
        force_isa(None if name == "auto" else name)
    except KernelError as error:
        raise ConfigError([f"cpu_isa: {error}"]) from error


def resolve_exact(name: str, device: torch.device) -> bool:
    """Returns whether neighbours may not change a bit, for "auto", "on" or "off"."""
    return device.type == "cpu" if name == "auto" else name == "on"


def beside_steps(device: torch.device) -> AbstractContextManager[object]:
    """Inside, the calling thread and the steps do not wait for what the other asks of a GPU.

    For work that changes nothing that steps read. On a CPU nothing happens.
    """
    if device.type != "cuda":
        return nullcontext()
    # another stream may begin before the base is there
    torch.cuda.synchronize(device)
    return torch.cuda.stream(torch.cuda.Stream(device))


def default_adapter_bytes(model: DecoderModel, *, max_rank: int) -> int:
    """Returns bytes for a few adapters of the highest rank on all modules, which is many of the usual ones."""
    return _NUM_LARGEST_ADAPTERS * image_elements(model.base, rank=max_rank, dtype=model.dtype) * model.dtype.itemsize


def default_kv_bytes(model: DecoderModel, *, max_num_seqs: int) -> int:
    """Returns bytes for as many of the longest sequences as may run, or a share of what is free if that is less."""
    num_blocks = max_num_seqs * num_blocks_for(model.max_positions)
    wanted = num_blocks * DeviceMemory.block_elements(model.config) * model.dtype.itemsize
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(wanted, int(free * _KV_SHARE))
