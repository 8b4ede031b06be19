"""What is added to the base's weights, one module at a time: the interface, and one adapter behind it.

Whatever gives a module's update can be merged: an adapter in its normal form here, several adapters with weights
elsewhere. Knows no file, no model class, and not where the base's weights come from.
Letters: R rank, I in-features, O out-features, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from lorasrv_adapters.base import BaseModel
from lorasrv_adapters.normalize import NormalizedAdapter, ReplacedRows
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What becomes of one weight: first `rows` take their places, then `delta` is added.

    Attributes:
        delta: float32 in the shape of the weight, or None where nothing is added.
        rows: what stands in place of rows of the weight, or None.
    """

    delta: Tensor | None = None
    rows: ReplacedRows | None = None


class UpdateSource(Protocol):
    """Updates of the modules of one base, by module."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules of which the weight changes, in the base's order."""

    @property
    def biases(self) -> Mapping[str, Tensor]:
        """Bias by module, [O] float32, in place of the base's; a module that is not there keeps its own."""

    def update(self, name: str, weight: Tensor) -> Update:
        """The update of one of `modules`.

        Args:
            name: of the module.
            weight: the base's, float32, as the Hugging Face model has it: [O, I], of an embedding [V, O], of a norm
                [I]. Read only.
        """


class AdapterUpdates:
    """One adapter as updates: W' = d * W + B A for a linear layer, its transpose for an embedding.

    Attributes:
        modules: of which the weight changes, in the base's order.
        biases: in place of the base's, by module.
    """

    def __init__(self, adapter: NormalizedAdapter, base: BaseModel) -> None:
        """Takes an adapter that was normalized for `base`."""
        self._adapter = adapter
        self._embeddings = {name for name, module in base.modules.items() if module.kind == "embedding"}
        changed = {
            name for name, module in adapter.modules.items() if module.rank or module.rows or module.d is not None
        }
        self.modules = tuple(name for name in base.modules if name in changed)
        self.biases: Mapping[str, Tensor] = {
            name: module.bias for name, module in adapter.modules.items() if module.bias is not None
        }

    def update(self, name: str, weight: Tensor) -> Update:
        """See `UpdateSource.update`."""
        module = self._adapter.modules[name]
        if not module.rank and module.d is None:
            return Update(rows=module.rows)
        over_tokens = name in self._embeddings
        # a product's bits may depend on its operands' strides; these are the ones a tied head has
        delta = module.a.T.contiguous() @ module.b.T.contiguous() if over_tokens else module.b @ module.a
        if module.d is not None:
            factor = module.d - 1
            delta.addcmul_(replace_rows(weight, module.rows), factor if over_tokens else factor[:, None])
        return Update(delta=delta, rows=module.rows)


def replace_rows(weight: Tensor, rows: ReplacedRows | None) -> Tensor:
    """The weight with rows in place of its own: a new tensor, or `weight` itself where there are none."""
    if rows is None:
        return weight
    values = rows.values.to(torch.float32, copy=True)
    if rows.ids is None:
        return values.view(weight.shape)
    return weight.index_copy(0, rows.ids, values)
