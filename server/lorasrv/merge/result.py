"""What the merged model will be, before a weight is computed: its tensors and its `config.json`.

Knows what the served families can express, and refuses what they cannot; computes no weight but those of two tables
that may stay one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorasrv.errors import MergeError
from lorasrv.merge.base import StreamedBase
from lorasrv.merge.fold import fold
from lorasrv.merge.update import UpdateSource
from lorasrv.model.config import parse_model_config
from lorasrv.model.families import FAMILIES, Family
from lorasrv.model.tensors import EMBEDDING, HEAD, bias_shapes, linear_shapes, stored_names, wide_shapes

# of the largest weight: what two ways to round one sum may differ by
_SAME = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultPlan:
    """The merged model.

    Attributes:
        config: the content of its `config.json`; nothing about quantization.
        shapes: name -> shape of every tensor, in the order of `stored_names`.
        quantizable: names of the matrices in decoder layers.
        untied: whether the base shares one table between embedding and head, and the result does not.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    quantizable: frozenset[str]
    untied: bool


def plan_result(raw: Mapping[str, Any], base: StreamedBase, source: UpdateSource) -> ResultPlan:
    """What merging `source` into `base` gives.

    Args:
        raw: the content of the base's `config.json`.
        base: what is merged into.
        source: what is merged.

    Raises:
        MergeError: the result could not be expressed; lists every reason.
    """
    reasons: list[str] = []
    (architecture,) = raw["architectures"]
    changes: dict[str, object] = _bias_keys(FAMILIES[architecture], base, source.biases, reasons)
    if reasons:
        raise MergeError(reasons)
    untied = base.tied and not _stays_tied(base, source)
    if untied:
        changes["tie_word_embeddings"] = False
    kept = {key: value for key, value in raw.items() if key != "quantization_config"}
    config = {**kept, **changes}
    result = parse_model_config(config)
    every = {**linear_shapes(result), **wide_shapes(result)}
    return ResultPlan(
        config=config,
        shapes={name: every[name] for name in stored_names(result)},
        quantizable=frozenset(linear_shapes(result)),
        untied=untied,
    )


def result_bias(name: str, base: StreamedBase, source: UpdateSource) -> Tensor:
    """A bias of the result: the source's, else the base's, else zeros; [O] float32."""
    module = name.removesuffix(".bias")
    own = source.biases.get(module, base.bias(module))
    return torch.zeros(base.modules[module].out_features) if own is None else own


def _bias_keys(
    family: Family, base: StreamedBase, biases: Mapping[str, Tensor], reasons: list[str]
) -> dict[str, object]:
    """The keys that give a bias to modules that have none in the base."""
    existing = bias_shapes(base.config)
    keys: dict[str, object] = {}
    for module in biases:
        if f"{module}.bias" in existing:
            continue
        found = [key for key, modules in family.bias_keys.items() if module.endswith(modules)]
        if base.modules[module].kind != "linear" or not found:
            reasons.append(
                f"{module}: the adapter gives it a bias, which {family.model_type} models cannot have there; serve the "
                "adapter unmerged"
            )
        else:
            keys[found[0]] = True
    return keys


def _stays_tied(base: StreamedBase, source: UpdateSource) -> bool:
    """Whether embedding and head are one table still, but for rounding."""
    names = [name.removesuffix(".weight") for name in (EMBEDDING, HEAD)]
    if not any(name in source.modules for name in names):
        return True
    embedding, head = (fold(base, source, name).weight for name in names)
    largest = embedding.abs().max()
    return bool((embedding - head).abs_().max() <= _SAME * largest)
