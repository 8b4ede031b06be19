"""Tensors that keep their place on a device while their numbers change, all in one copy from the host.

Knows names, shapes and dtypes; knows nothing of what the numbers mean.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

_ALIGNMENT = 256

Shape = tuple[torch.dtype, tuple[int, ...]]


class StagedTensors:
    """Named tensors on a device, each with a twin on the host that is written first.

    Args:
        shapes: dtype and shape by name. They lie one after the other in this order.
        device: where the tensors are; for CUDA the twins are in pinned memory.

    Attributes:
        host: the twins; all zero at first. Write to them between `wait` and `upload` only.
        device: the tensors.
    """

    def __init__(self, shapes: Mapping[str, Shape], *, device: torch.device) -> None:
        starts, end = [], 0
        for dtype, shape in shapes.values():
            starts.append(end)
            end += -(-dtype.itemsize * torch.Size(shape).numel() // _ALIGNMENT) * _ALIGNMENT
        pinned = device.type == "cuda"
        self._host = torch.zeros(end, dtype=torch.uint8, pin_memory=pinned)
        self._device = torch.zeros(end, dtype=torch.uint8, device=device)
        self._copied = torch.cuda.Event() if pinned else None
        self.host = _views(self._host, shapes, starts)
        self.device = _views(self._device, shapes, starts)

    def wait(self) -> None:
        """Blocks until the last `upload` has read the host's side."""
        if self._copied is not None:
            self._copied.synchronize()

    def upload(self) -> None:
        """Copies everything, in order with whatever else the current stream does; on CUDA it does not block."""
        self._device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()


def _views(memory: Tensor, shapes: Mapping[str, Shape], starts: list[int]) -> dict[str, Tensor]:
    return {
        name: memory[start : start + dtype.itemsize * torch.Size(shape).numel()].view(dtype).view(shape)
        for (name, (dtype, shape)), start in zip(shapes.items(), starts, strict=True)
    }
