"""Updates of several adapters made sparse and added up, one whole layer at a time.

    ties      the largest elements of every update, those of the sign that wins, averaged  (arXiv 2306.01708, 3)
    dare      every element of an update dropped by chance, the others made larger         (arXiv 2311.03099, 3)

It knows updates as matrices; nothing of factors, methods or files. Letters: O out-features, I in-features.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lorasrv.merge.update import Update, UpdateSource, replace_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsifier:
    """How updates are made sparse.

    Attributes:
        method: see this module.
        density: the part of elements that stays.
        seed: of what dare drops.
    """

    method: Literal["ties", "dare"]
    density: float
    seed: int


class SparseUpdates:
    """Several sources of updates as one.

    Holds the updates of all of them of one module at a time, in float32.

    Attributes:
        modules: of which the weight changes, in the base's order.
        biases: in place of the base's, by module.
    """

    def __init__(
        self,
        sources: Sequence[UpdateSource],
        weights: Sequence[float],
        sparsifier: Sparsifier,
        *,
        modules: Sequence[str],
        biases: Mapping[str, Tensor],
    ) -> None:
        """Takes sources for one base.

        Args:
            sources: at least one.
            weights: of their updates.
            sparsifier: how they are added up.
            modules: of the base, in its order.
            biases: of the result.
        """
        self._sources = tuple(sources)
        self._weights = tuple(weights)
        self._sparsifier = sparsifier
        changed = {name for source in sources for name in source.modules}
        self.modules = tuple(name for name in modules if name in changed)
        self.biases = biases

    def update(self, name: str, weight: Tensor) -> Update:
        """See `UpdateSource.update`."""
        there = [
            (_whole(source.update(name, weight), weight), weight_of)
            for source, weight_of in zip(self._sources, self._weights, strict=True)
            if name in source.modules
        ]
        updates, weights = [update for update, _ in there], [weight_of for _, weight_of in there]
        density = self._sparsifier.density
        if self._sparsifier.method == "ties":
            return Update(delta=ties(updates, weights, density=density))
        return Update(delta=dare(updates, weights, density=density, seed=self._sparsifier.seed, name=name))


def _whole(update: Update, weight: Tensor) -> Tensor:
    """All that an update changes, as one matrix."""
    replaced = replace_rows(weight, update.rows) - weight
    return replaced if update.delta is None else replaced + update.delta


def ties(updates: Sequence[Tensor], weights: Sequence[float], *, density: float) -> Tensor:
    """Trim, elect signs, average what agrees.

    Args:
        updates: of one layer, each [O, I] float32.
        weights: of the updates; they count after the election.
        density: the part of every update's elements that is kept, the largest.

    Returns:
        [O, I] float32.
    """
    trimmed = [_largest(update, density) for update in updates]
    positive = torch.stack(trimmed).sum(0) >= 0
    total, count = torch.zeros_like(updates[0]), torch.zeros_like(updates[0])
    for update, weight in zip(trimmed, weights, strict=True):
        agrees = torch.where(positive, update > 0, update < 0)
        total += torch.where(agrees, weight * update, 0.0)
        count += agrees
    return total / count.clamp(min=1)


def _largest(update: Tensor, density: float) -> Tensor:
    flat = update.flatten()
    kept = flat.abs().topk(int(density * flat.numel()), sorted=False).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(update)


def dare(updates: Sequence[Tensor], weights: Sequence[float], *, density: float, seed: int, name: str) -> Tensor:
    """Drop elements by chance, make the others larger by as much, add.

    Args:
        updates: of one layer, each [O, I] float32.
        weights: of the updates.
        density: the chance of an element to stay.
        seed: with `name`, of what is dropped, whatever other layers there are.
        name: of the layer.

    Returns:
        [O, I] float32.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    total = torch.zeros_like(updates[0])
    for update, weight in zip(updates, weights, strict=True):
        stays = torch.rand(update.shape, generator=generator) < density
        total += torch.where(stays, (weight / density) * update, 0.0)
    return total
