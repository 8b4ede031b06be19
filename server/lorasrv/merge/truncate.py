"""The best update of a smaller rank, and how much of the whole it is. Knows matrices alone.

Letters: R rank, I in-features, O out-features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncated:
    """B A, the nearest of its rank to an update.

    Attributes:
        a: [R, I] float32.
        b: [O, R] float32.
        energy: the part of the update's squared norm that is kept, from 0 to 1.
    """

    a: Tensor
    b: Tensor
    energy: float


def truncate(update: Tensor, rank: int) -> Truncated:
    """Truncate an update given whole.

    Args:
        update: [O, I].
        rank: at most; an update of lower rank keeps its own.
    """
    u, sizes, v = torch.linalg.svd(update.double(), full_matrices=False)
    return _first(u, sizes, v, rank)


def truncate_product(a: Tensor, b: Tensor, rank: int) -> Truncated:
    """Truncate the update B A without ever making it: QR of both factors, and the singular values of what is between.

    Args:
        a: [R, I].
        b: [O, R].
        rank: at most.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, sizes, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return _first(q_b @ u, sizes, v @ q_a.T, rank)


def _first(u: Tensor, sizes: Tensor, v: Tensor, rank: int) -> Truncated:
    total = sizes.square().sum()
    # what float32 factors cannot hold is no rank
    kept = min(rank, int((sizes > sizes[:1].sum() * torch.finfo(torch.float32).eps).sum()))
    # both factors take the root, so that neither is badly scaled
    root = sizes[:kept].sqrt()
    return Truncated(
        a=(root[:, None] * v[:kept]).float(),
        b=(u[:, :kept] * root).float(),
        energy=float(sizes[:kept].square().sum() / total) if total > 0 else 1.0,
    )
