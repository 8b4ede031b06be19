"""Scratch memory of kernels: taken once, used again by every call of the same thread.

Knows names, shapes and dtypes; knows nothing of what is stored. Contents do not survive the call that took them.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lorasrv_kernels.errors import KernelError


class Workspace:
    """Named scratch tensors; each name has one buffer, which grows to the largest request and never shrinks."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device], Tensor] = {}
        self._views: dict[tuple[str, torch.device], dict[tuple[torch.dtype, tuple[int, ...]], Tensor]] = {}
        self._is_sealed = False

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialized tensor, valid until the same name is taken again.

        No memory is allocated once a name has seen its largest request on a device.

        Raises:
            KernelError: the workspace is sealed, and the buffer would have to grow.
        """
        views = self._views.setdefault((name, device), {})
        view = views.get((dtype, shape))
        if view is None:
            # ordinary tensors, so that both inference mode and training may write to them; under inference mode
            # view(dtype) makes an inference tensor even of an ordinary one
            with torch.inference_mode(mode=False):
                view = self._buffer(name, shape, dtype, device).view(dtype).view(shape)
            # looked up after growing, which drops the views of the smaller buffer
            self._views[name, device][dtype, shape] = view
        return view

    def seal(self) -> None:
        """From now on no buffer grows and so none moves: whoever recorded addresses may rely on them."""
        self._is_sealed = True

    @property
    def num_bytes(self) -> int:
        """Bytes held over all names and devices."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        num_bytes = dtype.itemsize
        for size in shape:
            num_bytes *= size
        buffer = self._buffers.get((name, device))
        if buffer is None or buffer.nbytes < num_bytes:
            if self._is_sealed:
                held = 0 if buffer is None else buffer.nbytes
                raise KernelError(f"the workspace is sealed: {name!r} holds {held} bytes and {num_bytes} are asked for")
            buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            self._buffers[name, device] = buffer
            self._views[name, device] = {}
        return buffer[:num_bytes]


class _ThreadWorkspace(threading.local):
    def __init__(self) -> None:
        self.workspace = Workspace()


_thread = _ThreadWorkspace()


def thread_workspace() -> Workspace:
    """The workspace of the calling thread: its own, freed with the thread, or that of `using_workspace`."""
    return _thread.workspace


@contextmanager
def using_workspace(workspace: Workspace) -> Iterator[None]:
    """Inside, kernels that the calling thread calls take their scratch memory from `workspace`."""
    before = _thread.workspace
    _thread.workspace = workspace
    try:
        yield
    finally:
        _thread.workspace = before
