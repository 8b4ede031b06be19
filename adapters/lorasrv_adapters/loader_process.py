"""Adapters loaded beside the engine without taking time from it: in processes that run when nobody else wants to.

A process of its own forks one child a load. Each begins with the memory of the server as it was when the loader was
made, the base included, and shares its pages; it works at the scheduler's idle priority, hands the image over in memory
that both map, and ends, with all that it used. It knows folders and loaded adapters; what is in them, the function that
it is given knows.
"""

import gc
import json
import logging
import mmap
import os
import signal
import socket
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasrv_adapters import errors
from lorasrv_adapters.errors import AdapterError
from lorasrv_adapters.image import AdapterImage
from lorasrv_adapters.records import LoadedAdapter, RankSummary

_MAX_PATH_BYTES = 1 << 16
_LENGTH_BYTES = 8
_ALIGN_BYTES = 64

_log = logging.getLogger(__name__)


class LoaderProcess:
    """Implements `records.AdapterLoader`; `load` may be called from any thread, and takes turns.

    Args:
        locate: Turns a source into a folder, in the calling thread; it may download.
        read: Reads the folder, in a child process.
    """

    def __init__(self, locate: Callable[[str], Path], read: Callable[[Path], LoadedAdapter]) -> None:
        self._locate = locate
        self._read = read
        self._turn = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = _fork()
        if self._pid == 0:
            self._socket.close()
            _serve(theirs, read)
        theirs.close()
        self._end = weakref.finalize(self, _end, self._socket, self._pid)

    def load(self, source: str) -> LoadedAdapter:
        """Load an adapter; blocks.

        Raises:
            AdapterError: As `locate` and `read` do.
            RuntimeError: The child ended without an answer, e.g. because there was no memory for it.
        """
        folder = self._locate(source)
        with self._turn:
            answer = self._ask(folder)
        if answer is None:
            _log.error("the loader process is gone; loading beside the engine from now on")
            return self._read(folder)
        return _unpacked(answer)

    def close(self) -> None:
        """End the process; waits for a load that is under way."""
        with self._turn:
            self._end()

    def _ask(self, folder: Path) -> mmap.mmap | None:
        """The answer's memory; None if nobody answers."""
        if not self._end.alive:
            return None
        try:
            self._socket.send(os.fsencode(folder))
            message, descriptors, _, _ = socket.recv_fds(self._socket, 256, 1)
        except OSError:
            message, descriptors = b"", []
        if descriptors:
            try:
                return mmap.mmap(descriptors[0], 0)
            finally:
                os.close(descriptors[0])
        if message:
            raise RuntimeError(f"{folder}: the process that read it {message.decode()}")
        return None


def _fork() -> int:
    with warnings.catch_warnings():
        # Python warns of threads at a fork; the child holds none of their locks and starts threads of its own
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _end(connection: socket.socket, pid: int) -> None:
    # a later fork may hold a copy, and keep it open
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _serve(connection: socket.socket, read: Callable[[Path], LoadedAdapter]) -> None:
    """Fork a child for each folder asked for, until the other side is gone; never returns."""
    # a key press in the terminal is meant for the server, which closes the connection
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # pages stay shared as long as nobody writes to them
    gc.disable()
    _be_idle()
    while folder := connection.recv(_MAX_PATH_BYTES):
        pid = _fork()
        if pid == 0:
            os._exit(_answer(connection, read, Path(os.fsdecode(folder))))
        _, status = os.waitpid(pid, 0)
        if status:
            code = os.waitstatus_to_exitcode(status)
            connection.send(f"was ended by signal {-code}".encode() if code < 0 else b"failed")
    os._exit(0)


def _be_idle() -> None:
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except (AttributeError, OSError):
        os.nice(19)


def _answer(connection: socket.socket, read: Callable[[Path], LoadedAdapter], folder: Path) -> int:
    """Load in a thread of its own, because OpenMP's workers did not survive the fork; returns the exit status."""
    answers: list[int] = []

    def run() -> None:
        try:
            answers.append(_packed(read(folder)))
        except AdapterError as error:
            answers.append(_in_memory({"error": type(error).__name__, "text": str(error), "fields": vars(error)}, []))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if not answers:
        return 1
    socket.send_fds(connection, [b"done"], answers)
    return 0


def _packed(loaded: LoadedAdapter) -> int:
    """A descriptor of memory that holds a loaded adapter."""
    flat, table = loaded.image.flat, loaded.image.table
    facts = {
        "digest": loaded.digest,
        "kind": loaded.kind,
        "ranks": asdict(loaded.ranks),
        "num_modules": loaded.num_modules,
        "dtype": str(flat.dtype).removeprefix("torch."),
        "num_elements": flat.numel(),
        "table_shape": list(table.shape),
    }
    return _in_memory(facts, [table, flat])


def _in_memory(facts: Mapping[str, Any], tensors: list[Tensor]) -> int:
    content = json.dumps(facts, default=list).encode()
    starts, end = [], _LENGTH_BYTES + len(content)
    for tensor in tensors:
        starts.append(-(-end // _ALIGN_BYTES) * _ALIGN_BYTES)
        end = starts[-1] + tensor.nbytes
    descriptor = os.memfd_create("lorasrv-adapter", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, end)
    with mmap.mmap(descriptor, end) as memory:
        memory[: _LENGTH_BYTES + len(content)] = len(content).to_bytes(_LENGTH_BYTES, "little") + content
        for tensor, start in zip(tensors, starts, strict=True):
            memory[start : start + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8).numpy().data
    return descriptor


def _unpacked(memory: mmap.mmap) -> LoadedAdapter:
    """The loaded adapter in the memory, which its tensors keep.

    Raises:
        AdapterError: It holds an error.
    """
    length = int.from_bytes(memory[:_LENGTH_BYTES], "little")
    facts = json.loads(memory[_LENGTH_BYTES : _LENGTH_BYTES + length])
    if "error" in facts:
        raise _error(facts)
    rows, columns = facts["table_shape"]
    start = -(-(_LENGTH_BYTES + length) // _ALIGN_BYTES) * _ALIGN_BYTES
    table = _tensor(memory, start, rows * columns, torch.int64).reshape(rows, columns)
    flat_start = -(-(start + table.nbytes) // _ALIGN_BYTES) * _ALIGN_BYTES
    flat = _tensor(memory, flat_start, facts["num_elements"], getattr(torch, facts["dtype"]))
    return LoadedAdapter(
        digest=facts["digest"],
        kind=facts["kind"],
        ranks=RankSummary(**facts["ranks"]),
        num_modules=facts["num_modules"],
        image=AdapterImage(flat=flat, table=table),
    )


def _tensor(memory: mmap.mmap, start: int, count: int, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=start) if count else torch.empty(0, dtype=dtype)


def _error(facts: Mapping[str, Any]) -> AdapterError:
    """The error as it was raised, built past its own constructor, which takes other arguments than it keeps."""
    kind: type[AdapterError] = getattr(errors, facts["error"])
    error = kind.__new__(kind, facts["text"])
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in facts["fields"].items()}
    error.__dict__.update(fields)
    return error
