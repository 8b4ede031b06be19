r"""Several adapters made one, each with a weight, by what they do to a layer and never by their factors apart.

    linear    W + sum w_i (W_i - W), W_i what adapter i makes of W; in the normal form no product is ever taken:
              d = 1 + sum w_i (d_i - 1),  A = [A_1; A_2; ...],  B = [w_1 B_1, w_2 B_2, ...]
    ties      the largest elements of every update, those of the sign that wins, averaged  (arXiv 2306.01708, 3)
    dare      every element of an update dropped by chance, the others made larger         (arXiv 2311.03099, 3)

It knows the normal form and tensors; no file and no method an adapter was trained with.
Letters: R rank, I in-features, O out-features.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lorasrv_adapters.base import BaseModel
from lorasrv_adapters.errors import AdapterIncompatibleError
from lorasrv_adapters.normalize import NormalizedAdapter, NormalizedModule, ReplacedRows
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighted:
    """One of the adapters that are combined.

    Attributes:
        adapter: in the normal form.
        weight: what its update is multiplied by; 1 alone is the adapter itself, bit for bit.
    """

    adapter: NormalizedAdapter
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    module: NormalizedModule
    weight: float


def linear(parts: Sequence[Weighted], base: BaseModel) -> NormalizedAdapter:
    """The weighted sum of what adapters do, exact and of the sum of their ranks.

    Args:
        parts: at least one.
        base: the base they are all for.

    Raises:
        AdapterIncompatibleError: a module has its output scaled by one adapter and rows replaced by one, which has no
            normal form; all such modules are listed.
    """
    names = dict.fromkeys(name for part in parts for name in part.adapter.modules)
    modules: dict[str, NormalizedModule] = {}
    reasons = []
    for name in names:
        found = [
            _Part(module=part.adapter.modules[name], weight=part.weight)
            for part in parts
            if name in part.adapter.modules
        ]
        scaled = any(part.module.d is not None for part in found)
        if len(found) > 1 and scaled and any(part.module.rows is not None for part in found):
            reasons.append(f"{name}: one adapter scales its output (DoRA), one replaces rows of its weight")
            continue
        modules[name] = _sum(name, found, base)
    if reasons:
        raise AdapterIncompatibleError(reasons)
    return NormalizedAdapter(
        digest=_digest(parts),
        kind="dora" if any(module.d is not None for module in modules.values()) else "lora",
        base_model=parts[0].adapter.base_model,
        modules=modules,
    )


def _sum(name: str, parts: Sequence[_Part], base: BaseModel) -> NormalizedModule:
    module = base.modules[name]
    ones, zeros = torch.ones(module.out_features), torch.zeros(module.out_features)
    return NormalizedModule(
        a=torch.cat([part.module.a for part in parts]),
        b=torch.cat([part.weight * part.module.b for part in parts], dim=1),
        d=_average(ones, [(part.module.d, part.weight) for part in parts]),
        bias=_average(
            zeros if module.bias is None else module.bias, [(part.module.bias, part.weight) for part in parts]
        ),
        rows=_rows(name, parts, base),
        scale=1.0 if any(part.module.scale is not None for part in parts) else None,
    )


def _average(own: Tensor, others: Sequence[tuple[Tensor | None, float]]) -> Tensor | None:
    """own + sum w_i (other_i - own) over those there are, in float64 so that one of weight 1 comes back as it was."""
    there = [(other, weight) for other, weight in others if other is not None]
    if not there:
        return None
    total = (1 - sum(weight for _, weight in there)) * own.double()
    return (total + sum(weight * other.double() for other, weight in there)).float()


def _rows(name: str, parts: Sequence[_Part], base: BaseModel) -> ReplacedRows | None:
    replaced = [(part.module.rows, part.weight) for part in parts if part.module.rows is not None]
    if not replaced:
        return None
    if len(parts) == 1 and parts[0].weight == 1:
        return parts[0].module.rows
    # what replaces all rows makes the others' part of all
    if any(rows.ids is None for rows, _ in replaced):
        ids, own = None, _all_rows(name, base)
    else:
        ids = torch.cat([rows.ids for rows, _ in replaced if rows.ids is not None]).unique()
        own = torch.cat([base.weight_rows(name, row, row + 1) for row in ids.tolist()]).cpu()
    total = own.double()
    for rows, weight in replaced:
        places = _places(rows, ids)
        total[places] += weight * (rows.values.double() - own[places])
    return ReplacedRows(values=total.float(), ids=ids)


def _all_rows(name: str, base: BaseModel) -> Tensor:
    """A weight as served, a norm's as one row: float32, on the CPU."""
    weight = base.weight_rows(name, 0, base.modules[name].weight_shape[0]).cpu()
    return weight[None] if weight.ndim == 1 else weight


def _places(rows: ReplacedRows, ids: Tensor | None) -> Tensor | slice:
    """Where rows stand among those of `ids`, or of all."""
    if rows.ids is None:
        return slice(None)
    return rows.ids if ids is None else torch.searchsorted(ids, rows.ids)


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


def _digest(parts: Sequence[Weighted]) -> str:
    if len(parts) == 1 and parts[0].weight == 1:
        return parts[0].adapter.digest
    content = "\n".join(f"{part.adapter.digest} {part.weight!r}" for part in parts)
    return hashlib.sha256(f"lorasrv-combined-1\n{content}".encode()).hexdigest()
