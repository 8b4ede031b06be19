"""What an adapter has to know of a base model: its modules by name, their shapes, and their weights as served.

It knows no model class and no file. Letters: O out-features, I in-features, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

ModuleKind = Literal["linear", "head", "embedding", "norm", "other"]
"""A linear layer of a decoder layer, the output head, the token embedding, a norm, or anything else with a name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModule:
    """One module of a base.

    Attributes:
        kind: What it is, and so what an adapter may do to it.
        out_features: O; of an embedding the width of a token's row, of a norm 1, of anything else 0.
        in_features: I; of an embedding V, of a norm its width, of anything else 0.
        bias: [O], fp32, CPU, or None.
    """

    kind: ModuleKind
    out_features: int = 0
    in_features: int = 0
    bias: Tensor | None = None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight in the Hugging Face model: an embedding's is [V, O], a norm's [I]."""
        if self.kind == "embedding":
            return (self.in_features, self.out_features)
        return (self.in_features,) if self.kind == "norm" else (self.out_features, self.in_features)


class BaseModel(Protocol):
    """A base as it is served."""

    @property
    def modules(self) -> Mapping[str, BaseModule]:
        """Every module by its name in the Hugging Face model; those that can be adapted first, in the table's order."""

    @property
    def tied(self) -> bool:
        """Whether the head's weight is the embedding's."""

    @property
    def dtype(self) -> torch.dtype:
        """Of everything that is not quantized."""

    @property
    def digest(self) -> str:
        """What identifies the weights as served: 64 hexadecimal digits."""

    def weight_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of a weight as served (dequantized): a new [stop - start, width], fp32, where the base is.

        Rows of an embedding are those of tokens; of a norm its elements, [stop - start].
        """


def table_order(base: BaseModel) -> tuple[str, ...]:
    """Return the names of the modules that have a row in the adapters' table, in its order."""
    return tuple(name for name, module in base.modules.items() if module.kind != "other")


def find_kind(base: BaseModel, kind: ModuleKind) -> str:
    """Return the name of the first module of a kind; empty if there is none."""
    return next((name for name, module in base.modules.items() if module.kind == kind), "")
