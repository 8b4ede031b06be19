"""A safetensors file read strictly: its header is checked before anything is allocated or handed on.

It knows the file format and limits; it knows no tensor's meaning. Pickle is never opened.
"""

import json
import math
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lorasrv_adapters.errors import AdapterCorruptError, AdapterIncompatibleError, SourceNotFoundError
from lorasrv_adapters.fields import unique_keys

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAMES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.pkl")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The accepted element types."""

_LENGTH_BYTES = 8
_MAX_DIGITS = 16
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightLimits:
    """What a weights file may ask for.

    Attributes:
        header_bytes: Longest JSON header.
        num_tensors: Most tensors.
        num_dims: Most dimensions of a tensor.
        total_bytes: Most bytes of all tensors together.
    """

    header_bytes: int = 8 << 20
    num_tensors: int = 20_000
    num_dims: int = 2
    total_bytes: int = 4 << 30


DEFAULT_LIMITS = WeightLimits()


class TensorEntry(NamedTuple):
    """One tensor's place in the file; a tuple, because there may be 20 000.

    Attributes:
        name: Its name.
        dtype: Its element type, a key of `DTYPES`.
        shape: Its shape.
        start: Its first byte, counted from the end of the header.
        stop: The byte after its last.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_weights(folder: Path, limits: WeightLimits = DEFAULT_LIMITS) -> dict[str, Tensor]:
    """Read `adapter_model.safetensors` into memory of its own; later changes to the file do not reach it.

    Args:
        folder: The adapter's folder.
        limits: What the file may ask for.

    Returns:
        Every tensor by name, on the CPU, in the file's dtype.

    Raises:
        SourceNotFoundError: There is no such file, nor a pickled one.
        AdapterIncompatibleError: The weights are pickled, or beyond a limit, or hold other element types.
        AdapterCorruptError: The file is malformed, truncated or longer than its header says, or a link.
    """
    path = folder / WEIGHTS_NAME
    if not path.exists() and not path.is_symlink():
        _refuse_missing(folder)
    with open_regular(path) as file:
        entries = read_header(file, limits)
        # rank-0 modules alone make a file without a byte of data
        data = memoryview(bytearray(entries[-1].stop if entries else 0))
        if file.readinto(data) != len(data):
            raise AdapterCorruptError([f"{WEIGHTS_NAME} ends early"])
    return {entry.name: _tensor(entry, data) for entry in entries}


def read_header(file: BufferedReader, limits: WeightLimits) -> list[TensorEntry]:
    """Check a safetensors header and return its tensors in the order of their data.

    Leaves the file at the first byte of data. Reads the header and nothing else.

    Raises:
        AdapterIncompatibleError: A limit is exceeded, or an element type is not accepted.
        AdapterCorruptError: The header is malformed, or does not describe exactly this file.
    """
    file_bytes = os.fstat(file.fileno()).st_size
    header = _read_header_bytes(file, file_bytes, limits)
    try:
        # UTF-8 only, where json.loads on bytes would also take UTF-16 and UTF-32
        content = json.loads(
            header.decode(), object_pairs_hook=unique_keys, parse_int=_size, parse_float=_size, parse_constant=_size
        )
        _refuse_surrogates(content)
    except (ValueError, RecursionError) as error:
        raise AdapterCorruptError([f"{WEIGHTS_NAME}: the header is not valid JSON: {error}"]) from error
    if not isinstance(content, dict):
        raise AdapterCorruptError([f"{WEIGHTS_NAME}: the header is not a JSON object"])
    _check_metadata(content.pop("__metadata__", {}))
    if len(content) > limits.num_tensors:
        raise AdapterIncompatibleError(
            [f"{WEIGHTS_NAME} holds {len(content)} tensors; the limit is {limits.num_tensors}"]
        )
    entries = _entries(content, limits)
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    _check_layout(entries, file_bytes - _LENGTH_BYTES - len(header), limits)
    return entries


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading; never follows a link in the last part of the path, never waits for a pipe.

    Raises:
        AdapterCorruptError: It is a link or no regular file.
        SourceNotFoundError: It does not exist or may not be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise AdapterCorruptError([f"{path.name} is a symbolic link; copy the file into the folder"]) from error
        raise SourceNotFoundError(str(path.parent), f"{path.name}: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise AdapterCorruptError([f"{path.name} is not a regular file"])
        yield file


def pickle_hint(names: Collection[str]) -> str:
    """Return what to do about the first pickled weights among file names, or an empty string without any."""
    pickled = next((name for name in PICKLE_NAMES if name in names), "")
    return (
        f"{pickled} is a pickle, which can run code; write it as safetensors with `lorasrv convert`" if pickled else ""
    )


def _refuse_missing(folder: Path) -> None:
    if hint := pickle_hint({path.name for path in folder.iterdir()} if folder.is_dir() else ()):
        raise AdapterIncompatibleError([hint])
    raise SourceNotFoundError(str(folder), f"there is no {WEIGHTS_NAME}")


def _read_header_bytes(file: BufferedReader, file_bytes: int, limits: WeightLimits) -> bytes:
    prefix = file.read(_LENGTH_BYTES)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < _LENGTH_BYTES or length > file_bytes - _LENGTH_BYTES:
        raise AdapterCorruptError([f"{WEIGHTS_NAME} has {file_bytes} bytes and is shorter than its header says"])
    if length > limits.header_bytes:
        raise AdapterIncompatibleError(
            [f"{WEIGHTS_NAME}: the header has {length} bytes; the limit is {limits.header_bytes}"]
        )
    header = file.read(length)
    # one character beyond ASCII widens a whole string to four bytes for each of its characters
    if 4 * length > limits.header_bytes and not (header.isascii() and b"\\u" not in header):
        raise AdapterIncompatibleError(
            [f"{WEIGHTS_NAME}: the header has {length} bytes; with characters beyond ASCII the limit is a quarter"]
        )
    # a bound on the JSON values, before any of them becomes an object: a tensor takes 1, 2 and 5 of these
    most = {b"{": limits.num_tensors + 2, b"[": 3 * limits.num_tensors + 10, b",": 6 * limits.num_tensors + 100}
    if any(header.count(mark) > count for mark, count in most.items()):
        raise AdapterIncompatibleError([f"{WEIGHTS_NAME} holds more than {limits.num_tensors} tensors"])
    return header


def _size(text: str) -> int:
    # a header has no other numbers; -0 would pass as one, and thousands of digits take long to convert
    if len(text) > _MAX_DIGITS or not text.isdigit():
        raise ValueError(f"{text[:40]} is no size")
    return int(text)


def _refuse_surrogates(content: object) -> None:
    # JSON can spell halves of characters, which are no text: the safetensors library refuses them
    if isinstance(content, dict):
        "".join(content).encode()
        metadata = content.get("__metadata__")
        if isinstance(metadata, dict):
            "".join(str(item) for pair in metadata.items() for item in pair).encode()


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterCorruptError([f"{WEIGHTS_NAME}: __metadata__ must map names to strings"])


def _entries(content: Mapping[str, object], limits: WeightLimits) -> list[TensorEntry]:
    entries: list[TensorEntry] = []
    malformed: list[str] = []
    refused: list[str] = []
    for name, raw in content.items():
        entry = _entry(name, raw)
        if entry is None:
            malformed.append(f"{WEIGHTS_NAME}: the header entry of {name[:200]!r} is malformed")
        elif entry.dtype not in DTYPES:
            refused.append(f"{name[:200]!r} has element type {entry.dtype[:20]!r}; accepted are {', '.join(DTYPES)}")
        elif len(entry.shape) > limits.num_dims:
            refused.append(f"{name[:200]!r} has {len(entry.shape)} dimensions; the limit is {limits.num_dims}")
        elif entry.stop - entry.start != math.prod(entry.shape) * DTYPES[entry.dtype].itemsize:
            malformed.append(f"{WEIGHTS_NAME}: the bytes of {name[:200]!r} do not match its shape")
        else:
            entries.append(entry)
    if malformed:
        raise AdapterCorruptError(malformed)
    if refused:
        raise AdapterIncompatibleError(refused)
    return entries


def _entry(name: str, raw: object) -> TensorEntry | None:
    if not isinstance(raw, dict) or raw.keys() != _ENTRY_KEYS or not isinstance(raw["dtype"], str):
        return None
    shape, offsets = raw["shape"], raw["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return None
    return TensorEntry(name, raw["dtype"], tuple(shape), *offsets)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and (
        not value or (set(map(type, value)) == {int} and 0 <= min(value) <= max(value) < 1 << 48)
    )


def _check_layout(entries: list[TensorEntry], data_bytes: int, limits: WeightLimits) -> None:
    end = 0
    for entry in entries:
        if entry.start != end:
            raise AdapterCorruptError(
                [f"{WEIGHTS_NAME}: {entry.name[:200]!r} starts at byte {entry.start}, not {end}: an overlap or a hole"]
            )
        end = entry.stop
    if end != data_bytes:
        raise AdapterCorruptError([f"{WEIGHTS_NAME} has {data_bytes} bytes of data; its header describes {end}"])
    if end > limits.total_bytes:
        raise AdapterIncompatibleError([f"{WEIGHTS_NAME} holds {end} bytes; the limit is {limits.total_bytes}"])


def _tensor(entry: TensorEntry, data: memoryview) -> Tensor:
    dtype = DTYPES[entry.dtype]
    if entry.start == entry.stop:
        return torch.empty(entry.shape, dtype=dtype)
    if entry.start % dtype.itemsize:
        return torch.frombuffer(bytearray(data[entry.start : entry.stop]), dtype=dtype).reshape(entry.shape)
    count = math.prod(entry.shape)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=entry.start).reshape(entry.shape)
