"""The trainable tensors of one adapter, side by side in flat buffers.

An optimizer then sees a few large tensors instead of hundreds of small ones: one pass over each, and bitsandbytes pages
and packs them, which it does not do to small ones. Knows no method and no model.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

_ALIGNMENT = 64


class FlatParameters:
    """Named float32 tensors, grouped; those of a group are views of one buffer, and so are their gradients.

    Attributes:
        tensors: every tensor by its name, requiring a gradient.
        buffers: one flat parameter a group, its gradient always there.
    """

    def __init__(self, initial: Mapping[str, Mapping[str, Tensor]], *, device: torch.device | str = "cpu") -> None:
        """Takes group -> name -> initial value; names must differ between groups too."""
        self.tensors: dict[str, Tensor] = {}
        self.buffers: dict[str, Parameter] = {}
        for group, values in initial.items():
            places = dict(_lay_out(values))
            size = sum(-(-value.numel() // _ALIGNMENT) * _ALIGNMENT for value in values.values())
            buffer = Parameter(torch.zeros(size, dtype=torch.float32, device=device))
            buffer.grad = torch.zeros_like(buffer)
            self.buffers[group] = buffer
            for name, value in values.items():
                span = slice(places[name], places[name] + value.numel())
                tensor = buffer.data[span].view(value.shape).copy_(value).requires_grad_()
                # autograd adds to a gradient that is there, in place
                tensor.grad = buffer.grad[span].view(value.shape)
                self.tensors[name] = tensor

    def clear_gradients(self) -> None:
        """Sets every gradient to zero, in place."""
        for buffer in self.buffers.values():
            assert buffer.grad is not None
            buffer.grad.zero_()

    def gradient_norm(self) -> Tensor:
        """The 2-norm of all gradients together: [] float32."""
        return torch.nn.utils.get_total_norm(
            [buffer.grad for buffer in self.buffers.values() if buffer.grad is not None]
        )


def _lay_out(values: Mapping[str, Tensor]) -> Iterator[tuple[str, int]]:
    start = 0
    for name, value in values.items():
        yield name, start
        start += -(-value.numel() // _ALIGNMENT) * _ALIGNMENT
