"""The estimate of a run's memory: the paper's largest setting, and the parts that can be counted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lorasrv.embedded import embedded_base
from lorasrv.model.config import ModelConfig, parse_model_config, read_model_config
from lorasrv.model.loader import load_model
from lorasrv.train.app import estimate
from lorasrv.train.config import JobConfig, RunConfig, TrainConfig
from lorasrv.train.job import TrainingJob
from lorasrv.train.memory import MemoryPart, estimate_memory
from lorasrv_kernels.nf4 import NF4Weight

LLAMA_65B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}


def parts(
    model: ModelConfig, *, tokens: int = 512, optimizer: str = "paged_adamw", **options: Any
) -> dict[str, MemoryPart]:
    job = JobConfig(out=Path("/x"), data=(Path("/x"),), **options)
    run = RunConfig(micro_batch_tokens=tokens, checkpoint_layers=True)
    found = estimate_memory(model, run, {"one": job}, dtype_bytes=2, optimizer=optimizer, max_tokens=tokens)
    return {part.name: part for part in found}


def test_65_billion_parameters_fit_48_gb_as_in_the_paper() -> None:
    """QLoRA (https://arxiv.org/abs/2305.14314): rank 64 on all linear layers, one sequence of 512, paged optimizer."""
    found = parts(parse_model_config(LLAMA_65B), rank=64)
    resident = sum(part.num_bytes for part in found.values() if not part.paged)
    assert 40e9 < resident < 48e9
    assert found["optimizer states"].paged
    # 0.80 billion trained parameters
    assert found["adapters"].num_bytes == pytest.approx(4 * 0.80e9, rel=0.01)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {}),
        ("dora", {"rank_pattern": (("q_proj", 3),)}),
        ("adalora", {"modules_to_save": ("lm_head", "norm")}),
        ("lora", {"modules_to_save": ("embed_tokens",), "rank_pattern": ((r"layers\.0\..*", 9),)}),
    ],
)
def test_base_and_adapters_are_what_is_loaded(method: str, options: dict[str, Any]) -> None:
    model = load_model(embedded_base(), dtype=torch.bfloat16)
    found = parts(read_model_config(embedded_base()), method=method, rank=6, **options)
    weights = [weight for _, weight in model.stored()]
    quantized = sum(weight.num_bytes for weight in weights if isinstance(weight, NF4Weight))
    assert found["base, linear layers"].num_bytes == quantized
    assert found["base, everything else"].num_bytes == model.num_bytes - quantized
    config = JobConfig(out=Path("/x"), data=(Path("/x"),), method=method, rank=6, **options)  # type: ignore[arg-type]
    job = TrainingJob(
        "one",
        config,
        base=model.base,
        base_name="b",
        examples=[None],
        held_out=[],
        max_steps=10,
        seed=0,  # type: ignore[list-item]
    )
    elements = sum(tensor.numel() for tensor in job.adapter.parameters.tensors.values())
    assert found["adapters"].num_bytes == found["gradients"].num_bytes == 4 * elements


def test_one_weight_for_a_tied_head_and_embedding() -> None:
    model = parse_model_config({**LLAMA_65B, "tie_word_embeddings": True})
    low_rank = parts(model)["adapters"].num_bytes
    found = [
        parts(model, modules_to_save=("lm_head", "embed_tokens"), ensure_weight_tying=tied)["adapters"].num_bytes
        for tied in (False, True)
    ]
    table = 4 * 32000 * 8192
    assert found == [low_rank + 2 * table, low_rank + table]


def test_checkpointed_layers_and_8_bit_states_take_less() -> None:
    model = parse_model_config(LLAMA_65B)
    run = RunConfig(micro_batch_tokens=512, checkpoint_layers=False)
    job = JobConfig(out=Path("/x"), data=(Path("/x"),))
    kept = estimate_memory(model, run, {"a": job}, dtype_bytes=2, optimizer="adamw", max_tokens=512)
    whole, checkpointed = sum(part.num_bytes for part in kept if "activations" in part.name), parts(model)
    assert sum(part.num_bytes for name, part in checkpointed.items() if "activations" in name) < 0.12 * whole
    assert parts(model, optimizer="adamw_8bit")["optimizer states"].num_bytes < 0.26 * kept[4].num_bytes


def test_layers_keep_everything_where_that_fits_in_half_of_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = JobConfig(out=tmp_path / "adapter", data=(tmp_path / "data",))

    def names(memory: int, **options: Any) -> set[str]:
        monkeypatch.setattr("lorasrv.train.app.total_memory", lambda _: memory)
        parts = estimate(TrainConfig(run=RunConfig(device="cpu", **options), jobs={"one": job}))
        return {part.name for part in parts if part.num_bytes}

    again = "activations, of the layer at hand"
    needed = sum(
        part.num_bytes
        for part in estimate(TrainConfig(run=RunConfig(device="cpu", checkpoint_layers=False), jobs={"one": job}))
    )
    assert again not in names(2 * needed)
    assert again in names(2 * needed - 1)
    assert again not in names(1, checkpoint_layers=False)
    assert again in names(1 << 60, checkpoint_layers=True)
