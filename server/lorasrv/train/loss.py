"""Cross-entropy over the vocabulary that never holds the logits of more than a few rows.

The gradient of the hidden states is computed with the loss, chunk by chunk, so that neither way keeps logits. Knows no
adapter and no layer.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

CHUNK_ELEMENTS = 1 << 22
"""Logits at a time; 16 MiB in float32."""


def token_losses(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The weighted loss of every row: weights * -log softmax(hidden head^T)[targets].

    Differentiable in `hidden`, and in `head` where it requires a gradient, for one common upstream gradient: the rows
    may be summed, in parts too, and nothing else.

    Args:
        hidden: [T, I].
        head: [V, I], multiplied in the dtype of `hidden`; one to be trained gets its gradient in its own.
        targets: [T] int64; rows of weight 0 may hold anything.
        weights: [T] float32.

    Returns:
        [T] float32.
    """
    losses: Tensor = _ChunkedCrossEntropy.apply(hidden, head, targets, weights)  # type: ignore[no-untyped-call]
    return losses


class _ChunkedCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        head = head.to(hidden.dtype)
        rows = weights.nonzero().flatten()
        losses = torch.zeros_like(weights)
        hidden_gradient = torch.zeros_like(hidden) if wants_hidden else None
        head_gradient = torch.zeros_like(head, dtype=torch.float32) if wants_head else None
        for chunk in rows.split(max(1, CHUNK_ELEMENTS // len(head))):
            taken = hidden[chunk]
            log_probabilities = (taken @ head.T).log_softmax(1, dtype=torch.float32)
            losses[chunk] = weights[chunk] * -log_probabilities.gather(1, targets[chunk, None])[:, 0]
            if not (wants_hidden or wants_head):
                continue
            # in place: a row of probabilities is as long as the vocabulary
            gradient = log_probabilities.exp_()
            gradient.scatter_add_(1, targets[chunk, None], -torch.ones_like(gradient[:, :1]))
            gradient = gradient.mul_(weights[chunk, None]).to(head.dtype)
            if hidden_gradient is not None:
                hidden_gradient[chunk] = gradient @ head
            if head_gradient is not None:
                head_gradient += gradient.T @ taken
        ctx.save_for_backward(hidden_gradient, head_gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_gradient, head_gradient = ctx.saved_tensors
        # a sum hands the same number to every row
        factor = upstream[0].flatten()[:1]
        scaled = [None if part is None else part * factor.to(part.dtype) for part in (hidden_gradient, head_gradient)]
        return scaled[0], scaled[1], None, None
