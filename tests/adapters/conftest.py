import hashlib
import json
import struct
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from lorasrv_adapters.base import BaseModule, ModuleKind
from lorasrv_adapters.checkpoint import write_checkpoint
from lorasrv_adapters.image import AdapterImage
from lorasrv_adapters.records import AdapterRecord, LoadedAdapter, RankSummary
from torch import Tensor


class FakeBase:
    """A base of named random weights, as far as adapters look at one."""

    def __init__(self, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor] | None = None) -> None:
        self.weights = dict(weights)
        self.modules = {
            name: base_module(name, weight, (biases or {}).get(name)) for name, weight in self.weights.items()
        }
        self.modules["model.layers.0.mlp"] = BaseModule(kind="other")
        self.tied = False
        self.dtype = torch.float32
        self.digest = "0" * 64
        self.largest_read = 0

    def weight_rows(self, name: str, start: int, stop: int) -> Tensor:
        self.largest_read = max(self.largest_read, stop - start)
        return self.weights[name][start:stop].to(torch.float32, copy=True)


def base_module(name: str, weight: Tensor, bias: Tensor | None) -> BaseModule:
    """A module as its name says what it is."""
    if weight.ndim == 1:
        return BaseModule(kind="norm", out_features=1, in_features=len(weight))
    rows, columns = weight.shape
    if name.endswith("embed_tokens"):
        return BaseModule(kind="embedding", out_features=columns, in_features=rows)
    kind: ModuleKind = "head" if name == "lm_head" else "linear"
    return BaseModule(kind=kind, out_features=rows, in_features=columns, bias=bias)


Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


@pytest.fixture
def base() -> FakeBase:
    generator = torch.Generator().manual_seed(7)
    shapes = {
        Q: (24, 16),
        V: (8, 16),
        "model.layers.0.mlp.down_proj": (16, 40),
        "model.layers.1.self_attn.q_proj": (24, 16),
        "lm_head": (50, 16),
        "model.embed_tokens": (50, 16),
        "model.layers.0.input_layernorm": (16,),
        "model.norm": (16,),
    }
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return FakeBase(weights, {Q: torch.randn(24, generator=generator), V: torch.randn(8, generator=generator)})


@pytest.fixture
def lora_config() -> dict[str, object]:
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": [Q, V]}


@pytest.fixture
def lora_tensors(base: FakeBase) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    tensors = {}
    for name in (Q, V):
        out_features, in_features = base.modules[name].weight_shape
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


class FakeLoader:
    """Loads sources of the form "place:content"; the content decides the digest, and a test may change it."""

    def __init__(self) -> None:
        self.places: dict[str, str] = {}
        self.num_loads = 0
        self.failure: Exception | None = None
        self.started = threading.Semaphore(0)
        self.gate: threading.Event | None = None
        self._lock = threading.Lock()

    def load(self, source: str) -> LoadedAdapter:
        with self._lock:
            self.num_loads += 1
        self.started.release()
        if self.gate is not None:
            self.gate.wait(timeout=30)
        if self.failure is not None:
            raise self.failure
        place, _, content = source.partition(":")
        return loaded_adapter(self.places.get(place, content))


def loaded_adapter(content: str) -> LoadedAdapter:
    digest = hashlib.sha256(content.encode()).hexdigest()
    flat = torch.full((64,), float(int(digest[:4], 16)))
    table = torch.tensor([[0, 32, -1, 1, -1, -1, 0, -1]], dtype=torch.int64)
    return LoadedAdapter(
        digest=digest,
        kind="lora",
        ranks=RankSummary(min=1, max=1, sum=1),
        num_modules=1,
        image=AdapterImage(flat=flat, table=table),
    )


class RecordingObserver:
    """Notes what it is told, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, object]] = []

    def adapter_loaded(self, record: AdapterRecord, seconds: float) -> None:
        self.events.append(("loaded", record.adapter_id))
        assert seconds >= 0

    def adapter_load_failed(self, reason: str) -> None:
        self.events.append(("failed", reason))

    def adapter_unloaded(self, adapter_id: str) -> None:
        self.events.append(("unloaded", adapter_id))

    def adapter_evicted(self, level: str) -> None:
        self.events.append(("evicted", level))


@pytest.fixture
def loader() -> FakeLoader:
    return FakeLoader()


@pytest.fixture
def new_loader() -> type[FakeLoader]:
    return FakeLoader


@pytest.fixture
def observer() -> RecordingObserver:
    return RecordingObserver()
