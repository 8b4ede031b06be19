import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from lorasrv_adapters.checkpoint import write_checkpoint
from torch import Tensor


class FakeBase:
    """A base of named random weights, as far as adapters look at one."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = dict(weights)
        self.modules = {name: (weight.shape[0], weight.shape[1]) for name, weight in self.weights.items()}
        self.digest = "0" * 64
        self.largest_read = 0

    def weight_rows(self, name: str, start: int, stop: int) -> Tensor:
        self.largest_read = max(self.largest_read, stop - start)
        return self.weights[name][start:stop].float()


Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


@pytest.fixture
def base() -> FakeBase:
    generator = torch.Generator().manual_seed(7)
    shapes = {
        Q: (24, 16),
        V: (8, 16),
        "model.layers.0.mlp.down_proj": (16, 40),
        "model.layers.1.self_attn.q_proj": (24, 16),
    }
    return FakeBase({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})


@pytest.fixture
def lora_config() -> dict[str, object]:
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": [Q, V]}


@pytest.fixture
def lora_tensors(base: FakeBase) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    tensors = {}
    for name in (Q, V):
        out_features, in_features = base.modules[name]
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, in_features, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out_features, 4, generator=generator)
    return tensors


@pytest.fixture
def write_raw() -> Callable[[Path, Mapping[str, object], Mapping[str, Tensor]], Path]:
    """Write a folder without any check."""

    def write(folder: Path, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Path:
        write_checkpoint(folder, {"peft_type": "LORA", "target_modules": ["x"]}, tensors)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    return write


@pytest.fixture
def pack_safetensors() -> Callable[..., bytes]:
    """Build a safetensors file from a header given as an object or as bytes."""

    def pack(header: object, data: bytes = b"", length: int | None = None) -> bytes:
        content = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(content) if length is None else length) + content + data

    return pack
