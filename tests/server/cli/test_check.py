"""`lorasrv check` on a tiny base and adapters made for it."""

import json

import pytest
import torch
from lorasrv import embedded
from lorasrv_adapters.checkpoint import write_checkpoint
from safetensors.torch import save_file

HIDDEN, MLP, VOCAB = 64, 64, 32
MODULE = "model.layers.0.self_attn.q_proj"
CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "tiny",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": HIDDEN, "intermediate_size": MLP, "vocab_size": VOCAB, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(sizes | heads | kind))
    layer = "model.layers.0"
    linear = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    norms = [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", "model.norm"]
    tensors = {f"{layer}.{name}.weight": torch.randn(HIDDEN, HIDDEN) for name in linear}
    tensors |= {f"{name}.weight": torch.ones(HIDDEN) for name in norms}
    save_file(tensors | {"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def adapter(tmp_path):
    def write(*, in_features=HIDDEN, b=0.5, **config):
        tensors = {
            f"base_model.model.{MODULE}.lora_A.weight": torch.full((4, in_features), 0.25),
            f"base_model.model.{MODULE}.lora_B.weight": torch.full((HIDDEN, 4), b),
        }
        write_checkpoint(tmp_path / "adapter", CONFIG | config, tensors)
        return tmp_path / "adapter"

    return write


def test_an_adapter_that_fits_is_shown_module_by_module(lorasrv, base, adapter):
    end = lorasrv("check", adapter(), "--base", base)
    assert end.code == 0
    assert [line.split() for line in end.out.splitlines()] == [
        ["module", "kind", "rank", "out_features", "in_features"],
        [MODULE, "lora", "4", "64", "64"],
    ]
    assert "it would be served: 1 modules" in end.err


def test_json_has_the_modules_and_nothing_else_is_on_stdout(lorasrv, base, adapter):
    report = lorasrv("check", adapter(), "--base", base, "--json").json
    assert (report["served"], report["kind"], report["base_model"], report["max_rank"]) == (True, "lora", "tiny", 4)
    assert report["modules"] == [
        {"module": MODULE, "kind": "lora", "rank": 4, "out_features": HIDDEN, "in_features": HIDDEN}
    ]
    assert len(report["digest"]) == 64


def test_an_adapter_that_does_not_fit_is_status_3_with_every_reason(lorasrv, base, adapter):
    path = adapter(in_features=32, b=float("nan"))
    end = lorasrv("check", path, "--base", base)
    assert (end.code, end.out) == (3, "")
    refusal = lorasrv("check", path, "--base", base, "--json")
    assert (refusal.code, refusal.json["served"]) == (3, False)
    for reason in refusal.json["reasons"]:
        assert reason in end.err


def test_a_missing_adapter_is_status_4_and_a_missing_base_status_3(lorasrv, base, adapter, tmp_path):
    assert lorasrv("check", tmp_path / "none", "--base", base).code == 4
    assert lorasrv("check", adapter(), "--base", tmp_path / "none").code == 3


def test_the_base_is_the_embedded_one_unless_named(lorasrv, base, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "_ASSETS", tmp_path / "assets")
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "base").symlink_to(base)
    end = lorasrv("check", adapter())
    assert end.code == 0
    assert f"reading {tmp_path}/assets/base" in end.err
