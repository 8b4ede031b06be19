"""Pickled weights, read by a short-lived process that can do nothing but write tensors into a folder.

A pickle is a program. It runs with weights only, in a process without this one's memory, environment and working
folder, in bounded time and memory; what that process wrote is then read as strictly as any other file. This is for
`convert` alone: a server never opens a pickle.
"""

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from torch import Tensor

from lorasrv_adapters.errors import AdapterConversionError, AdapterCorruptError, SourceNotFoundError
from lorasrv_adapters.fields import MAX_JSON_BYTES, parse_json
from lorasrv_adapters.weights import (
    DEFAULT_LIMITS,
    PICKLE_NAMES,
    WEIGHTS_NAME,
    WeightLimits,
    open_regular,
    read_weights,
)

_PROGRAM = Path(__file__).with_name("unpickle.py")
_REASONS_NAME = "reasons.json"
_MAX_REASON_CHARS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeLimits:
    """How long reading a pickle may take.

    Attributes:
        cpu_seconds: Most seconds of processor time, after the libraries are loaded.
        wall_seconds: Most seconds in all.
    """

    cpu_seconds: int = 120
    wall_seconds: float = 900.0


DEFAULT_TIME = TimeLimits()


def find_pickle(folder: Path) -> Path | None:
    """Return the pickled weights of an adapter's folder, or None where there are none."""
    return next((path for name in PICKLE_NAMES if os.path.lexists(path := folder / name)), None)


def read_pickle(
    path: Path, limits: WeightLimits = DEFAULT_LIMITS, time: TimeLimits = DEFAULT_TIME
) -> dict[str, Tensor]:
    """Read a pickled weights file in a process of its own; blocks until that has ended.

    Args:
        path: The file.
        limits: What it may hold, as for a safetensors file.
        time: How long it may take.

    Returns:
        Every tensor by name, on the CPU, in the file's dtype.

    Raises:
        SourceNotFoundError: There is no such file.
        AdapterCorruptError: It is a link or no regular file.
        AdapterConversionError: It is no dictionary of accepted tensors, or beyond a limit.
        AdapterIncompatibleError: Its tensors are beyond the limits.
    """
    with open_regular(path) as file, tempfile.TemporaryDirectory(prefix="lorasrv-") as place:
        _check_size(file, path.name, limits)
        folder = Path(place)
        end = _run(file, folder, time)
        if end is not None:
            raise AdapterConversionError([f"{path.name}: {end}"])
        if reasons := _read_reasons(folder):
            raise AdapterConversionError([f"{path.name} is refused: {reason}" for reason in reasons])
        return read_weights(folder, limits)


def _check_size(file: BufferedReader, name: str, limits: WeightLimits) -> None:
    num_bytes = os.fstat(file.fileno()).st_size
    most = limits.total_bytes + limits.header_bytes
    if num_bytes > most:
        raise AdapterConversionError([f"{name} has {num_bytes} bytes; the limit is {most}"])


def _run(file: BufferedReader, folder: Path, time: TimeLimits) -> str | None:
    """Run the program on the file; returns how it failed, or None."""
    arguments = [str(folder / WEIGHTS_NAME), str(folder / _REASONS_NAME), str(time.cpu_seconds)]
    try:
        done = subprocess.run(
            # isolated: no environment, user packages or working folder decide what is imported
            [sys.executable, "-I", "-B", str(_PROGRAM), *arguments],
            stdin=file,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            timeout=time.wall_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"reading it took more than {time.wall_seconds:g} seconds"
    if done.returncode == -signal.SIGXCPU:
        return f"reading it took more than {time.cpu_seconds} seconds of processor time"
    if done.returncode < 0:
        return f"the process that read it was ended by signal {-done.returncode}"
    return f"the process that read it failed with status {done.returncode}" if done.returncode else None


def _read_reasons(folder: Path) -> list[str]:
    path = folder / _REASONS_NAME
    if not os.path.lexists(path):
        return []
    try:
        with open_regular(path) as file:
            reasons = parse_json(file.read(MAX_JSON_BYTES + 1), _REASONS_NAME)
    except (AdapterCorruptError, SourceNotFoundError):
        reasons = None
    if not isinstance(reasons, list) or not reasons:
        return ["no reason was given"]
    return [ascii(str(reason)[:_MAX_REASON_CHARS])[1:-1] for reason in reasons]
