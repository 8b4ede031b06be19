r"""Several adapters made one, each with a weight, by what they do to a layer and never by their factors apart.

    W + sum w_i (W_i - W), W_i what adapter i makes of W; in the normal form no product is ever taken:
    d = 1 + sum w_i (d_i - 1),  A = [A_1; A_2; ...],  B = [w_1 B_1, w_2 B_2, ...]

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


def _digest(parts: Sequence[Weighted]) -> str:
    if len(parts) == 1 and parts[0].weight == 1:
        return parts[0].adapter.digest
    content = "\n".join(f"{part.adapter.digest} {part.weight!r}" for part in parts)
    return hashlib.sha256(f"lorasrv-combined-1\n{content}".encode()).hexdigest()
