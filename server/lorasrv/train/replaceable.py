"""Embedding, norms and head of the base, in place of which an adapter may bring its own: each sees its own run of rows.

Knows no method, and not what lies between. Letters: T token rows, I hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasrv.train.loss import token_losses
from lorasrv.train.rowwise import rms_norm


class Replacing(Protocol):
    """What is asked of an adapter."""

    def replacement(self, module: str) -> Tensor | None:
        """The weight it brings for a module of this name, float32 and to be trained; None where the base's serves."""


class TrainableNorm:
    """A root mean square norm over the last dimension."""

    def __init__(self, name: str, weight: Tensor, *, epsilon: float) -> None:
        """Keeps `weight`, [I], in the dtype of the model; `name` is the module's."""
        self._name = name
        self._weight = weight
        self._epsilon = epsilon
        self._one = torch.ones_like(weight)

    def forward(self, x: Tensor, segments: Sequence[int], adapters: Sequence[Replacing]) -> Tensor:
        """x: [T, I] or [T, H, I]; segments: rows of each adapter. Returns the same shape."""
        own = _replacements(self._name, adapters)
        if own is None:
            return rms_norm(x, self._weight, self._epsilon)

        def scale(rows: Tensor, weight: Tensor | None) -> Tensor:
            return rows * (self._weight if weight is None else weight.to(x.dtype))

        return _by_segment(scale, rms_norm(x, self._one, self._epsilon), segments, own)


class TrainableEmbedding:
    """A row of a weight for every token."""

    def __init__(self, name: str, weight: Tensor) -> None:
        """Keeps `weight`, [V, I]; `name` is the module's."""
        self._name = name
        self._weight = weight

    def forward(self, token_ids: Tensor, segments: Sequence[int], adapters: Sequence[Replacing]) -> Tensor:
        """token_ids: [T] int64; segments: rows of each adapter. Returns [T, I]."""
        own = _replacements(self._name, adapters)
        if own is None:
            return self._weight[token_ids]

        def embed(ids: Tensor, weight: Tensor | None) -> Tensor:
            return self._weight[ids] if weight is None else F.embedding(ids, weight).to(self._weight.dtype)

        return _by_segment(embed, token_ids, segments, own)


class TrainableHead:
    """The product that gives every token of the vocabulary its logit, and the loss of these."""

    def __init__(self, name: str, weight: Tensor) -> None:
        """Keeps `weight`, [V, I]; `name` is the module's."""
        self._name = name
        self._weight = weight

    def losses(
        self, hidden: Tensor, targets: Tensor, weights: Tensor, segments: Sequence[int], adapters: Sequence[Replacing]
    ) -> Tensor:
        """hidden: [T, I]; the rest as `token_losses` takes it; segments: rows of each adapter. Returns [T] float32."""
        own = _replacements(self._name, adapters)
        if own is None:
            return token_losses(hidden, self._weight, targets, weights)
        parts = [tensor.split(list(segments)) for tensor in (hidden, targets, weights)]
        return torch.cat(
            [
                token_losses(rows, self._weight if head is None else head, *of_rows)
                for rows, *of_rows, head in zip(*parts, own, strict=True)
                if len(rows)
            ]
        )


def _replacements(name: str, adapters: Sequence[Replacing]) -> list[Tensor | None] | None:
    """For each adapter; None if none has one."""
    found = [adapter.replacement(name) for adapter in adapters]
    return None if all(one is None for one in found) else found


def _by_segment(
    compute: Callable[[Tensor, Tensor | None], Tensor],
    rows: Tensor,
    segments: Sequence[int],
    own: Sequence[Tensor | None],
) -> Tensor:
    return torch.cat([compute(part, weight) for part, weight in zip(rows.split(list(segments)), own, strict=True)])
