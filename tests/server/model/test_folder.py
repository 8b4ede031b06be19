"""What keeps a folder from being served is named in one error, before a weight is read."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lorasrv.errors import ModelLoadError
from lorasrv.model.folder import check_model_folder
from lorasrv.model.loader import load_model
from safetensors.torch import load_file, save_file
from tiny_peft import VOCAB_SIZE, new_base, save_base
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

QUANTIZATIONS = {
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
}
Edit = Callable[..., Path]


def reasons(folder: Path) -> list[str]:
    with pytest.raises(ModelLoadError) as caught:
        check_model_folder(folder)
    return list(caught.value.reasons)


@pytest.fixture
def qwen(tmp_path: Path) -> Edit:
    """A tiny Qwen2 with keys of its config and tensors replaced, None to leave one out."""

    def write(*, tensors: dict[str, torch.Tensor | None] | None = None, **config: Any) -> Path:
        save_base(tmp_path, "qwen2")
        stored = {**load_file(tmp_path / "model.safetensors"), **(tensors or {})}
        save_file(
            {name: tensor for name, tensor in stored.items() if tensor is not None}, tmp_path / "model.safetensors"
        )
        raw = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**raw, **config}))
        return tmp_path

    return write


def test_a_folder_that_can_be_served_gives_its_tokenizer(qwen: Edit) -> None:
    assert check_model_folder(qwen()).vocab_size == VOCAB_SIZE


def test_biases_and_norms_of_heads_are_missed_or_too_many(qwen: Edit) -> None:
    folder = qwen(
        tensors={
            "model.layers.0.self_attn.q_proj.bias": None,
            "model.layers.1.self_attn.k_proj.bias": torch.zeros(3),
            "model.layers.0.self_attn.o_proj.bias": torch.zeros(128),
            "model.layers.1.self_attn.q_norm.weight": torch.ones(32),
        }
    )
    lines = reasons(folder)
    assert len(lines) == 4
    assert "model.layers.0.self_attn.q_proj.bias [128] is missing" in lines[0]
    assert "model.layers.1.self_attn.k_proj.bias must be [64], got [3]" in lines[1]
    assert "o_proj.bias is not part" in lines[2]
    assert "q_norm.weight is not part" in lines[3]


def test_everything_is_named_in_one_error(qwen: Edit) -> None:
    folder = qwen(
        tensors={"model.norm.weight": None},
        vocab_size=VOCAB_SIZE - 4,
        some_new_multiplier=2,
        layer_types=["full_attention"],
        quantization_config={"quant_method": "awq"},
    )
    lines = reasons(folder)
    assert len(lines) == 7
    for part in (
        "awq",
        "some_new_multiplier",
        "layer_types",
        "model.norm.weight",
        "model.embed_tokens.weight has 300 rows, but config.json says vocab_size 296",
        "lm_head.weight has 300 rows, but config.json says vocab_size 296",
        "tokenizer.json has ids up to 299, the model only 296 tokens",
    ):
        assert sum(part in line for line in lines) == 1, part


def test_a_vocabulary_grown_in_the_files_only_is_named(tmp_path: Path) -> None:
    save_base(tmp_path, "mistral", tied=True)
    raw = (tmp_path / "config.json").read_bytes()
    model = new_base("mistral", tied=True)
    model.resize_token_embeddings(VOCAB_SIZE + 8, mean_resizing=False)
    model.save_pretrained(tmp_path)
    assert check_model_folder(tmp_path).vocab_size == VOCAB_SIZE
    (tmp_path / "config.json").write_bytes(raw)
    (line,) = reasons(tmp_path)
    assert "model.embed_tokens.weight has 308 rows, but config.json says vocab_size 300" in line


def test_a_config_that_tells_no_shapes_is_named_with_the_files(qwen: Edit) -> None:
    folder = qwen(num_attention_heads=3, vocab_size=None, attention_multiplier=2)
    (folder / "model.safetensors").write_bytes(b"no header")
    lines = reasons(folder)
    for part in ("multiple of num_key_value_heads", "vocab_size", "attention_multiplier", "model.safetensors cannot"):
        assert any(part in line for line in lines), part


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_quantizations_that_are_not_served_are_named(tmp_path: Path, quantization: str) -> None:
    """Files as transformers and bitsandbytes write them, with and without what their config says of it."""
    source = save_base(tmp_path, "qwen3")
    with warnings.catch_warnings():
        # bitsandbytes and transformers warn about what they deprecate in each other
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=QUANTIZATIONS[quantization], device_map="cpu", dtype=torch.bfloat16
        )
        model.save_pretrained(source)
    lines = reasons(source)
    assert quantization in lines[0]
    raw = json.loads((source / "config.json").read_text())
    del raw["quantization_config"]
    (source / "config.json").write_text(json.dumps(raw))
    named = reasons(source)
    assert named == lines[1:]
    assert len(named) == 14
    for line in named:
        assert "_proj.weight" in line
        assert f"{quantization} is not served" in line
    with pytest.raises(ModelLoadError) as caught:
        load_model(source, dtype=torch.float32)
    assert list(caught.value.reasons) == named
