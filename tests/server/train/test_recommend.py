"""What is recommended: the paper's settings where it measured, pieces that fit, and reasons where nothing does."""

import re
from typing import Any

import pytest
from lorasrv.errors import ConfigError
from lorasrv.model.config import parse_model_config
from lorasrv.train.recommend import GIVEN, Machine, Recommendation, recommend

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
SIZES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "33B": {"hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60, "num_attention_heads": 52},
    "65B": {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64},
}


def recommended(name: str, gigabytes: float, *, is_gpu: bool = True, policy: Any = "qlora", **given: Any) -> Any:
    machine = Machine(memory_bytes=int(gigabytes * 1e9), is_gpu=is_gpu, dtype_bytes=2)
    return recommend(parse_model_config({**LLAMA, **SIZES[name]}), given, machine=machine, policy=policy)


def values(found: Recommendation) -> dict[str, Any]:
    return {advice.key: advice.value for advice in found.settings}


@pytest.mark.parametrize(
    ("name", "gigabytes", "learning_rate", "dropout"),
    [("7B", 16, 2e-4, 0.1), ("13B", 24, 2e-4, 0.1), ("33B", 32, 1e-4, 0.05), ("65B", 48, 1e-4, 0.05)],
)
def test_the_papers_models_get_the_papers_settings(
    name: str, gigabytes: float, learning_rate: float, dropout: float
) -> None:
    """QLoRA (https://arxiv.org/abs/2305.14314), appendix B, and the scripts beside it."""
    found = recommended(name, gigabytes)
    assert found.resident_bytes < gigabytes * 1e9
    expected = {
        "rank": 64,
        "alpha": 16.0,
        "target_modules": ("all-linear",),
        "learning_rate": learning_rate,
        "dropout": dropout,
        "batch_size": 16,
        "schedule": "constant",
        "warmup": 0.03,
        "clip": 0.3,
        "optimizer": "paged_adamw",
    }
    assert {key: values(found)[key] for key in expected} == expected
    assert all(advice.source for advice in found.settings)


def test_memory_decides_the_pieces_and_nothing_else() -> None:
    tight, wide = (values(recommended("65B", gigabytes)) for gigabytes in (44.5, 640))
    assert (tight["micro_batch_tokens"], tight["checkpoint_layers"]) == (512, True)
    assert (wide["micro_batch_tokens"], wide["checkpoint_layers"]) == (4096, False)
    assert {key for key in wide if wide[key] != tight[key]} == {"micro_batch_tokens", "checkpoint_layers"}


def test_what_is_given_stays_and_counts() -> None:
    found = recommended("65B", 48, rank=8, micro_batch_tokens=700, method="dora")
    assert (values(found)["rank"], values(found)["micro_batch_tokens"]) == (8, 700)
    assert {advice.key for advice in found.settings if advice.source == GIVEN} == {
        "rank",
        "micro_batch_tokens",
        "method",
    }
    assert len(values(found)) == len(found.settings)
    lora = recommended("65B", 48, rank=8, micro_batch_tokens=700)
    # magnitudes, and the base's own outputs on the way back
    assert found.resident_bytes > lora.resident_bytes


def test_a_memory_that_is_too_small_is_told_part_by_part() -> None:
    with pytest.raises(ConfigError) as caught:
        recommended("65B", 24)
    first, *parts, last = caught.value.reasons
    assert re.fullmatch(r"512 tokens at a time take 41\.\d GB, and 22\.8 GB of 24\.0 GB can be used", first)
    assert parts[0] == "base, linear layers: 33.4 GB"
    assert last == "take a smaller base or a larger memory; no rank would make it fit"
    with pytest.raises(ConfigError, match="with rank 16 it would fit"):
        recommended("65B", 40)
    with pytest.raises(ConfigError, match="900 tokens at a time"):
        recommended("65B", 42, micro_batch_tokens=900, checkpoint_layers=False)


def test_falling_ranks_are_there_for_who_asks_and_say_who_disagrees() -> None:
    found = {name: recommended(name, 80, policy="size") for name in SIZES}
    assert [values(one)["rank"] for one in found.values()] == [16, 16, 8, 4]
    (source,) = {one.settings[0].source for one in found.values()}
    assert source == "popular write-ups: lower ranks for larger models; QLoRA used 64 at every size"
    assert values(found["7B"])["target_modules"] == ("q_proj", "v_proj")
    assert values(found["65B"])["learning_rate"] == 1e-4


def test_a_cpu_pages_nothing() -> None:
    on_cpu = recommended("7B", 16, is_gpu=False)
    assert values(on_cpu)["optimizer"] == "adamw"
    assert not any(part.paged for part in on_cpu.parts)
    asked = recommended("7B", 16, is_gpu=False, optimizer="paged_adamw")
    assert asked.resident_bytes == on_cpu.resident_bytes
