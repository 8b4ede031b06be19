"""The model, the adapters and the prompts that every system gets, written once in the formats they all read.

Random weights: the time of a step depends on shapes alone. Knows no system.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from lorasrv.model.config import read_model_config
from lorasrv.model.tensors import linear_shapes, wide_shapes
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is run; the defaults are a Llama shape of 446 M parameters."""

    num_layers: int = 24
    hidden_size: int = 1280
    intermediate_size: int = 3584
    num_heads: int = 20
    num_kv_heads: int = 4
    vocab_size: int = 8192
    ranks: tuple[int, ...] = (8, 16, 32, 8, 16, 32, 8, 16)
    prompt_tokens: int = 64
    new_tokens: int = 32

    def __str__(self) -> str:
        heads = f"{self.num_heads} heads over {self.num_kv_heads}"
        return (
            f"{self.num_layers} layers, hidden {self.hidden_size}, feed-forward {self.intermediate_size}, {heads}, "
            f"vocabulary {self.vocab_size}; prompts of {self.prompt_tokens} tokens; adapters of ranks "
            f"{', '.join(map(str, self.ranks))}"
        )

    @property
    def batch(self) -> int:
        """Sequences of a large batch, each with its own adapter."""
        return len(self.ranks)

    def prompts(self, batch: int) -> Tensor:
        """[batch, prompt_tokens] int64; the first are the same whatever the batch."""
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(self.vocab_size, (self.batch, self.prompt_tokens), generator=generator)
        return tokens[:batch]


SMALL = Workload(
    num_layers=2,
    hidden_size=256,
    intermediate_size=384,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=512,
    prompt_tokens=12,
    new_tokens=6,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Where a workload lies."""

    base: Path
    adapters: tuple[Path, ...]


def write(workload: Workload, folder: Path, *, dtype: torch.dtype) -> Files:
    """Writes a base and one LoRA adapter per rank, on all linear layers."""
    base = folder / "base"
    base.mkdir(parents=True)
    (base / "config.json").write_text(json.dumps(_config(workload, dtype)))
    config = read_model_config(base)
    generator = torch.Generator().manual_seed(0)
    shapes = {**wide_shapes(config), **linear_shapes(config)}
    tensors = {
        name: torch.ones(shape, dtype=dtype)
        if len(shape) == 1
        else torch.randn(shape, generator=generator).mul_(shape[1] ** -0.5).to(dtype)
        for name, shape in shapes.items()
    }
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapters = [
        write_adapter(base, folder / f"adapter-{index}", rank=rank, seed=index, dtype=dtype)
        for index, rank in enumerate(workload.ranks)
    ]
    return Files(base=base, adapters=tuple(adapters))


def write_adapter(base: Path, folder: Path, *, rank: int, seed: int, dtype: torch.dtype, dora: bool = False) -> Path:
    """Writes a LoRA or DoRA adapter of random weights on all linear layers of a base; returns its folder."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    targets = set()
    for key, (out_features, in_features) in linear_shapes(read_model_config(base)).items():
        name = key.removesuffix(".weight")
        targets.add(name.rpartition(".")[2])
        for letter, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
            values = torch.randn(shape, generator=generator).mul_(0.3 * shape[1] ** -0.5).to(dtype)
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] = values
        if dora:
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = torch.ones(out_features, dtype=dtype)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "use_dora": dora,
        "target_modules": sorted(targets),
        "base_model_name_or_path": "base",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _config(workload: Workload, dtype: torch.dtype) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": workload.hidden_size,
        "intermediate_size": workload.intermediate_size,
        "num_hidden_layers": workload.num_layers,
        "num_attention_heads": workload.num_heads,
        "num_key_value_heads": workload.num_kv_heads,
        "vocab_size": workload.vocab_size,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
