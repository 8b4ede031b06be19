"""What an adapter's tensors are before the first step: drawn, taken from the base, or taken over from another adapter.

Knows kinds, plans and the base; knows no model and no data. Letters: R rank, I in-features, O out-features.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from lorasrv_adapters.base import BaseModel
from lorasrv_adapters.config import Kind
from lorasrv_adapters.normalize import NormalizedModule, adapted_norms
from lorasrv_adapters.plan import ModulePlan
from torch import Tensor

# what AdaLoRA's authors draw P and Q from
_ADALORA_DEVIATION = 0.02
_POWER_ITERATIONS = 8
_OVERSAMPLED = 8

Tensors = dict[str, Tensor]
"""By role: a [R, I], b [O, R], and e [R, 1] or magnitude [O] where the kind has them; float32, on the CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One module that is to be adapted.

    Attributes:
        name: of the module.
        kind: the method.
        plan: its sizes.
        scale: of the product B A.
        base: the base, as it is served.
    """

    name: str
    kind: Kind
    plan: ModulePlan
    scale: float
    base: BaseModel

    @property
    def rank(self) -> int:
        """R."""
        assert self.plan.rank is not None
        return self.plan.rank

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of A and B."""
        return (self.rank, self.plan.base.in_features), (self.plan.base.out_features, self.rank)

    def weight(self) -> Tensor:
        """W, all of it: [O, I] float32."""
        return self.base.weight_rows(self.name, 0, self.plan.base.out_features)

    def norms(self, a: Tensor, b: Tensor) -> Tensor:
        """[O]: of the rows of W + B A."""
        return adapted_norms(self.name, a, b, self.base)


def drawn(place: Place, generator: torch.Generator, *, gaussian: bool) -> Tensors:
    """An update of zero: A uniform as PEFT's or normal, B zero; for AdaLoRA P and Q normal, e zero."""
    shape_a, shape_b = place.shapes
    if place.kind == "adalora":
        a, b = (torch.randn(shape, generator=generator) * _ADALORA_DEVIATION for shape in (shape_a, shape_b))
        return {"a": a, "b": b, "e": torch.zeros(place.rank, 1)}
    if gaussian:
        a = torch.randn(shape_a, generator=generator) / place.rank
    else:
        bound = 1 / math.sqrt(shape_a[1])
        a = torch.empty(shape_a).uniform_(-bound, bound, generator=generator)
    tensors = {"a": a, "b": torch.zeros(shape_b)}
    return tensors | {"magnitude": place.norms(tensors["a"], tensors["b"])} if place.kind == "dora" else tensors


def principal(place: Place, generator: torch.Generator) -> Tensors:
    """A and B from W's largest singular vectors: PiSSA, https://arxiv.org/abs/2404.02948 equations 2 and 3.

    s B A is the best approximation of W of rank R. Found by randomized subspace iteration, which is enough of an
    approximation: what training starts from is subtracted again in the end.
    """
    weight = place.weight()
    width = min(place.rank + _OVERSAMPLED, *weight.shape)
    basis = weight @ torch.randn(weight.shape[1], width, generator=generator)
    for _ in range(_POWER_ITERATIONS):
        basis = weight @ (weight.T @ torch.linalg.qr(basis).Q)
    basis = torch.linalg.qr(basis).Q
    u, sizes, v = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    root = (sizes[: place.rank] / place.scale).sqrt()
    return {"a": root[:, None] * v[: place.rank], "b": (basis @ u[:, : place.rank]) * root}


def continued(place: Place, found: NormalizedModule, generator: torch.Generator) -> Tensors:
    """Tensors that do exactly what a module of another adapter does, of whichever kind that is.

    Raises:
        ValueError: they cannot; the text says why.
    """
    if found.bias is not None or found.rows is not None:
        raise ValueError("it has a bias, or rows of the weight, which are not trained on")
    if found.rank > place.rank:
        raise ValueError(f"its rank is {found.rank}, above the {place.rank} asked for")
    if found.d is not None and place.kind != "dora":
        raise ValueError("its base's output is scaled, as only DoRA does it")
    update = found.b if found.d is None else found.b / found.d[:, None]
    if place.kind == "adalora":
        return _as_triplets(place, found.a, update, generator)
    tensors = drawn(place, generator, gaussian=False)
    # rows beyond the other's rank meet columns of zero
    tensors["a"][: found.rank] = found.a
    tensors["b"][:, : found.rank] = update / place.scale
    if place.kind == "dora":
        norms = place.norms(found.a, update)
        tensors["magnitude"] = norms if found.d is None else norms * found.d
    return tensors


def _as_triplets(place: Place, a: Tensor, b: Tensor, generator: torch.Generator) -> Tensors:
    """B A = P diag(scale e) Q with orthonormal P and Q, filled up with triplets of e = 0."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, sizes, v = torch.linalg.svd(r_b @ r_a.T)
    e = torch.zeros(place.rank, 1)
    e[: len(sizes), 0] = sizes / place.scale
    return {
        "a": _filled(q_a @ v.T, place.rank, generator).T.contiguous(),
        "b": _filled(q_b @ u, place.rank, generator),
        "e": e,
    }


def _filled(columns: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns, and orthonormal ones beside them, `count` in all as far as there are so many."""
    more = torch.randn(len(columns), count - columns.shape[1], generator=generator)
    for _ in range(2):
        more = more - columns @ (columns.T @ more)
    return torch.cat([columns, torch.linalg.qr(more).Q], dim=1)


def initial_tensors(
    place: Place, generator: torch.Generator, *, initialization: str, start: Mapping[str, NormalizedModule]
) -> Tensors:
    """The tensors of a module: of the adapter to go on from where that has the module, else as `initialization` says.

    Raises:
        ValueError: the other adapter's module cannot be gone on from.
    """
    if place.name in start:
        return continued(place, start[place.name], generator)
    if initialization == "pissa":
        return principal(place, generator)
    return drawn(place, generator, gaussian=initialization == "gaussian")


def whole_weight(place: Place, *, start: Mapping[str, NormalizedModule]) -> Tensor:
    """A weight to be trained as a whole: the other adapter's where it brings one, else the base's; float32.

    Raises:
        ValueError: the other adapter does something else to the module.
    """
    shape = place.plan.base.weight_shape
    found = start.get(place.name)
    if found is None:
        return place.base.weight_rows(place.name, 0, shape[0])
    if found.rows is None or found.rows.ids is not None or found.rank or found.bias is not None:
        raise ValueError("the adapter to go on from adapts it, the new one has all of its weight")
    return found.rows.values.float().reshape(shape)


def check_tied(name: str, followed: str, start: Mapping[str, NormalizedModule]) -> None:
    """Raises ValueError where the other adapter has two weights for modules that share one."""
    rows = [start[module].rows if module in start else None for module in (name, followed)]
    first, second = (None if one is None else one.values for one in rows)
    if first is second or (first is not None and second is not None and torch.equal(first, second)):
        return
    raise ValueError(f"the adapter to go on from has another weight for {followed}, to which it is to be tied")
