"""Adapters of a base that lies on a GPU: what meets its rows goes there first. No GPU is needed to see that."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lorasrv_adapters.base import BaseModule
from lorasrv_adapters.config import parse_adapter_config
from lorasrv_adapters.normalize import normalize
from torch import Tensor


class Elsewhere(Tensor):
    """A tensor that computes with its like alone, as one on another device does."""

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func is Tensor.to and len(tensors) == 2:
            return super().__torch_function__(Tensor.to, types, (args[0].as_subclass(cls), tensors[1].dtype))
        if func is Tensor.cpu:
            return args[0].as_subclass(Tensor)
        assert all(isinstance(tensor, cls) for tensor in tensors), f"{func} on two devices"
        return super().__torch_function__(func, types, args, kwargs or {})


def base_of(weights: dict[str, Tensor], where: type[Tensor]) -> SimpleNamespace:
    kinds = {"lin": "linear", "emb": "embedding"}
    modules = {}
    for name, weight in weights.items():
        rows, columns = weight.shape
        sizes = (columns, rows) if kinds[name] == "embedding" else (rows, columns)
        modules[name] = BaseModule(kind=kinds[name], out_features=sizes[0], in_features=sizes[1])
    return SimpleNamespace(
        modules=modules,
        tied=False,
        dtype=torch.float32,
        digest="0" * 64,
        weight_rows=lambda name, start, stop: weights[name][start:stop].clone().as_subclass(where),
    )


def test_an_adapter_meets_the_rows_where_the_base_is() -> None:
    torch.manual_seed(0)
    weights = {"lin": torch.randn(6, 8), "emb": torch.randn(9, 4)}
    tensors = {
        "base_model.model.lin.lora_A.weight": torch.randn(2, 8),
        "base_model.model.lin.lora_B.weight": torch.randn(6, 2),
        "base_model.model.lin.lora_magnitude_vector": torch.rand(6) + 1,
        "base_model.model.emb.lora_embedding_A": torch.randn(2, 9),
        "base_model.model.emb.lora_embedding_B": torch.randn(4, 2),
        "base_model.model.emb.lora_magnitude_vector": torch.rand(4) + 1,
        # PEFT saves it beside, and it must be the base's
        "base_model.model.emb.base_layer.weight": weights["emb"].clone(),
    }
    config = parse_adapter_config(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": True, "target_modules": ["lin", "emb"]}
    )
    here = normalize(config, tensors, base_of(weights, Tensor))
    there = normalize(config, tensors, base_of(weights, Elsewhere))
    for name, module in here.modules.items():
        assert type(there.modules[name].d) is Tensor
        assert torch.equal(there.modules[name].d, module.d)


def test_the_stand_in_computes_with_its_like_alone() -> None:
    with pytest.raises(AssertionError, match="two devices"):
        torch.ones(2).as_subclass(Elsewhere) + torch.ones(2)
