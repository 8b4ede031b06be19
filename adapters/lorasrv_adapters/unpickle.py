"""A program that turns a pickled weights file into safetensors; `pickles` runs it in a process of its own.

The one place where a pickle is opened, and nothing imports it. It reads standard input, and bounds its own memory, time
and files before it looks at the first byte. It knows tensors and element types, no names.
"""

import json
import os
import re
import resource
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import save_file
from torch import Tensor

MAX_REASONS = 100
MAX_KEY_CHARS = 200

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_UNSAFE = re.compile(r"GLOBAL (\S+)")

# loaded, cloned because views may share memory, and once more as bytes to write; sharing may double each
_MEMORY_PER_FILE_BYTE = 6
_SPARE_MEMORY_BYTES = 256 << 20


def main(weights: Path, reasons: Path, cpu_seconds: int) -> None:
    """Write either the tensors on standard input to `weights`, or why they are refused to `reasons`."""
    with open(sys.stdin.fileno(), "rb", closefd=False) as file:
        file_bytes = os.fstat(file.fileno()).st_size
        _bound_process(file_bytes, cpu_seconds)
        try:
            tensors, refusals = read_tensors(file, max_bytes=2 * file_bytes)
            if not refusals:
                save_file(tensors, weights, {"format": "pt"})
        # whatever a hostile file provokes is a reason to refuse it
        except Exception as error:
            refusals = [explain(error)]
    if refusals:
        reasons.write_text(json.dumps(refusals[:MAX_REASONS]))


def read_tensors(file: IO[bytes], *, max_bytes: int) -> tuple[dict[str, Tensor], list[str]]:
    """Unpickle a dictionary of tensors, and of nothing else.

    Args:
        file: The pickle; seekable.
        max_bytes: Most bytes of all tensors together; through views it may be more than the file holds.

    Returns:
        Contiguous tensors by name, none sharing memory, and every reason not to use them.
    """
    content: object = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        return {}, [f"it holds one {type(content).__name__} instead of a dictionary of tensors"]
    reasons = list(_examine(content))
    num_bytes = sum(value.numel() * value.itemsize for value in content.values() if isinstance(value, Tensor))
    if num_bytes > max_bytes:
        reasons.append(f"its tensors claim {num_bytes} bytes, more than its size explains")
    if reasons:
        return {}, reasons
    return {name: tensor.detach().resolve_neg().clone().contiguous() for name, tensor in content.items()}, []


def explain(error: Exception) -> str:
    """Say why a file could not be read, without torch's own advice to load it unsafely."""
    if match := _UNSAFE.search(str(error)):
        return f"it asks for {_shown(match[1])}; only tensors are accepted"
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return "it asks for more memory than its size explains"
    return f"it cannot be read as a dictionary of tensors ({type(error).__name__})"


def _examine(content: Mapping[object, object]) -> Iterator[str]:
    if not content:
        yield "it holds no tensors"
    for key, value in content.items():
        if not isinstance(key, str):
            yield f"a key is of type {type(key).__name__} instead of a name"
        elif not isinstance(value, Tensor):
            yield f"{_shown(key)} is of type {type(value).__name__} instead of a tensor"
        elif value.layout is not torch.strided or value.device.type != "cpu":
            yield f"{_shown(key)} is not a dense tensor with values"
        elif value.dtype not in _DTYPES:
            yield f"{_shown(key)} has element type {value.dtype}; accepted are {', '.join(map(str, _DTYPES))}"


def _shown(text: str) -> str:
    return ascii(text[:MAX_KEY_CHARS])


def _bound_process(file_bytes: int, cpu_seconds: int) -> None:
    """Limit what this process may use from here on; the libraries are loaded, the file is not."""
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    used_seconds = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    limits = {
        resource.RLIMIT_AS: used_bytes + _MEMORY_PER_FILE_BYTE * file_bytes + _SPARE_MEMORY_BYTES,
        resource.RLIMIT_CPU: int(used_seconds) + 1 + cpu_seconds,
        resource.RLIMIT_FSIZE: 2 * file_bytes + (16 << 20),
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        _, hardest = resource.getrlimit(kind)
        limit = value if hardest == resource.RLIM_INFINITY else min(value, hardest)
        resource.setrlimit(kind, (limit, hardest if kind == resource.RLIMIT_CPU else limit))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
