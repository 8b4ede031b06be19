"""A transformers model as adapters see a base, its weights as they are."""

from types import SimpleNamespace

import torch
from lorasrv_adapters.base import BaseModule
from torch import nn


def base_of(model: nn.Module) -> SimpleNamespace:
    """Everything `lorasrv_adapters.base.BaseModel` asks for, of a copy of the weights."""
    weights = {
        name: module.weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return SimpleNamespace(
        modules={name: _module(module, is_head=module is head) for name, module in model.named_modules() if name},
        tied=head.weight is embedding.weight,
        dtype=torch.float32,
        digest="0" * 64,
        weights=weights,
        weight_rows=lambda name, start, stop: weights[name][start:stop].clone(),
    )


def _module(module: nn.Module, *, is_head: bool) -> BaseModule:
    if isinstance(module, nn.Embedding):
        return BaseModule(kind="embedding", out_features=module.embedding_dim, in_features=module.num_embeddings)
    if isinstance(module, nn.Linear):
        bias = None if module.bias is None else module.bias.detach().clone()
        sizes = {"out_features": module.out_features, "in_features": module.in_features}
        return BaseModule(kind="head" if is_head else "linear", bias=bias, **sizes)
    weight = getattr(module, "weight", None)
    return (
        BaseModule(kind="other") if weight is None else BaseModule(kind="norm", out_features=1, in_features=len(weight))
    )
