"""One module's weight with its update, in float32, and what storing it costs.

Knows formats that weights are stored in; knows no file. Letters: O out-features, I in-features.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from lorasrv_kernels.nf4 import NF4Weight, dequantize, quantize
from torch import Tensor

from lorasrv.merge.base import StreamedBase
from lorasrv.merge.update import Update, UpdateSource, replace_rows
from lorasrv.model.adapted_linear import Weight

_CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Folded:
    """A merged weight.

    Attributes:
        weight: W + D in the shape of the base's, float32.
        delta: D, all that was changed, float32; None where nothing was.
        norm: Frobenius norm of W.
        before: W in 4 bits, where the result is to be in 4 bits too.
    """

    weight: Tensor
    delta: Tensor | None
    norm: float
    before: NF4Weight | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What became of one module's update D in the result.

    Attributes:
        module: its name.
        size: |D| / |W|.
        kept: the share of D that is in the stored weights: 1 if all of it is.
        error: |what storing changed| / |D|.
        rounded: whether D is no larger than what rounding W to the stored dtype changes.
    """

    module: str
    size: float
    kept: float
    error: float
    rounded: bool


def fold(base: StreamedBase, source: UpdateSource, name: str, *, in_nf4: bool = False) -> Folded:
    """The weight of a module with its update.

    Args:
        base: what is merged into.
        source: what is merged.
        name: of the module.
        in_nf4: whether the result is to be in 4 bits.
    """
    weight = base.weight(name)
    norm = math.sqrt(_dot(weight, weight))
    before = quantize(weight) if in_nf4 else None
    if name not in source.modules:
        return Folded(weight=weight, delta=None, norm=norm, before=before)
    weight, delta = _apply(weight, source.update(name, weight))
    return Folded(weight=weight, delta=delta, norm=norm, before=before)


def measure(name: str, folded: Folded, stored: Weight) -> Figures | None:
    """What of an update is in the weight as it is stored; None where there is no update.

    In 16 or 32 bits the stored weight is compared with W + D; in 4 bits what the update changed is compared with D, W
    taken as it would be stored without it.
    """
    delta = folded.delta
    if delta is None:
        return None
    squares = _dot(delta, delta)
    if squares == 0:
        return Figures(module=name, size=0.0, kept=1.0, error=0.0, rounded=False)
    along = lost = 0.0
    for start, stop in _row_chunks(delta):
        residual = _residual(folded, stored, start, stop)
        along += _dot(residual, delta[start:stop])
        lost += _dot(residual, residual)
    size = math.sqrt(squares) / folded.norm if folded.norm else math.inf
    return Figures(
        module=name,
        size=size,
        kept=1 + along / squares,
        error=math.sqrt(lost / squares),
        rounded=isinstance(stored, Tensor) and size < torch.finfo(stored.dtype).eps / 2,
    )


def _apply(weight: Tensor, update: Update) -> tuple[Tensor, Tensor]:
    """W + D, and D; takes W over where it can."""
    replaced = replace_rows(weight, update.rows)
    changed = None if replaced is weight else replaced - weight
    if update.delta is None:
        return replaced, torch.zeros_like(weight) if changed is None else changed
    return replaced.add_(update.delta), update.delta if changed is None else changed.add_(update.delta)


def _residual(folded: Folded, stored: Weight, start: int, stop: int) -> Tensor:
    """What storing changed, of some rows."""
    if not isinstance(stored, NF4Weight):
        return stored[start:stop].float() - folded.weight[start:stop]
    assert folded.before is not None
    assert folded.delta is not None
    after, before = (
        dequantize(weight, start_row=start, stop_row=stop, dtype=torch.float32) for weight in (stored, folded.before)
    )
    return after.sub_(before).sub_(folded.delta[start:stop])


def _row_chunks(weight: Tensor) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_ELEMENTS // max(1, weight[0].numel()))
    return ((start, min(start + step, len(weight))) for start in range(0, len(weight), step))


def _dot(one: Tensor, other: Tensor) -> float:
    """Sum of the products, in float64 over pieces."""
    pairs = zip(one.flatten().split(_CHUNK_ELEMENTS), other.flatten().split(_CHUNK_ELEMENTS), strict=True)
    return math.fsum(float(torch.dot(a, b)) for a, b in pairs)
