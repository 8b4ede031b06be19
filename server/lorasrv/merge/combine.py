"""Adapters, each with a weight, as one source of updates; by their updates, never by their factors apart.

It knows the methods by name, each of which is a module of its own; no file and no command line.
Letters: R rank, I in-features, O out-features, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from lorasrv_adapters.normalize import NormalizedAdapter, NormalizedModule

from lorasrv.merge.base import StreamedBase
from lorasrv.merge.config import Combine
from lorasrv.merge.linear import Weighted, linear
from lorasrv.merge.sparsify import SparseUpdates, Sparsifier
from lorasrv.merge.truncate import Truncated, truncate, truncate_product
from lorasrv.merge.update import AdapterUpdates, UpdateSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Combined:
    """What adapters are together.

    Attributes:
        source: the update.
        adapter: the same in the normal form; None where it has none.
        energy: by module, the part of the squared norm of B A that was kept, where its rank came down.
    """

    source: UpdateSource
    adapter: NormalizedAdapter | None
    energy: Mapping[str, float]


def combine(
    parts: Sequence[Weighted], base: StreamedBase, *, method: Combine, rank: int | None, density: float, seed: int
) -> Combined:
    """Combine adapters.

    Args:
        parts: at least one.
        base: what they are for.
        method: "linear", "ties", "dare" or "svd".
        rank: what svd comes down to.
        density: see `Sparsifier`.
        seed: see `Sparsifier`.

    Raises:
        AdapterIncompatibleError: they cannot be combined; lists every module.
    """
    adapter = linear(parts, base)
    whole = AdapterUpdates(adapter, base)
    if method == "linear":
        return Combined(source=whole, adapter=adapter, energy={})
    if method == "svd":
        assert rank is not None
        adapter, energy = _truncated(adapter, rank)
        return Combined(source=AdapterUpdates(adapter, base), adapter=adapter, energy=energy)
    sources = [AdapterUpdates(part.adapter, base) for part in parts]
    sparse = SparseUpdates(
        sources,
        [part.weight for part in parts],
        Sparsifier(method=method, density=density, seed=seed),
        modules=tuple(base.modules),
        biases=whole.biases,
    )
    return Combined(source=sparse, adapter=None, energy={})


def factored(combined: Combined, base: StreamedBase, *, rank: int, like: NormalizedAdapter) -> Combined:
    """An update that has no normal form, brought to a rank and into it.

    Args:
        combined: the update.
        base: what it is for.
        rank: of every module, at most.
        like: one of the adapters it was made of.
    """
    modules, energy = {}, {}
    for name in combined.source.modules:
        module = base.modules[name]
        delta = combined.source.update(name, base.weight(name)).delta
        assert delta is not None
        found = truncate((delta.T if module.kind == "embedding" else delta).reshape(module.out_features, -1), rank)
        modules[name] = NormalizedModule(a=found.a, b=found.b, scale=1.0)
        energy[name] = found.energy
    for name, bias in combined.source.biases.items():
        module = base.modules[name]
        empty = NormalizedModule(a=torch.empty(0, module.in_features), b=torch.empty(module.out_features, 0))
        modules[name] = replace(modules.get(name, empty), bias=bias)
    adapter = replace(like, kind="lora", modules=modules)
    return Combined(source=AdapterUpdates(adapter, base), adapter=adapter, energy=energy)


def _truncated(adapter: NormalizedAdapter, rank: int) -> tuple[NormalizedAdapter, dict[str, float]]:
    found: dict[str, Truncated] = {
        name: truncate_product(module.a, module.b, rank)
        for name, module in adapter.modules.items()
        if module.rank > rank
    }
    modules = {
        name: replace(module, a=found[name].a, b=found[name].b) if name in found else module
        for name, module in adapter.modules.items()
    }
    return replace(adapter, modules=modules), {name: truncated.energy for name, truncated in found.items()}
