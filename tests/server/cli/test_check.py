"""`lorasrv check` on a tiny base and adapters made for it."""

import json

import pytest
import torch
from lorasrv import embedded
from lorasrv.model.loader import load_model
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
    end = lorasrv("check", adapter(), "--base", base, "--dtype", "bfloat16")
    assert end.code == 0
    assert [line.split() for line in end.out.splitlines()] == [
        ["module", "kind", "rank", "scale", "bytes"],
        [MODULE, "lora", "4", "2", str(2 * 4 * 64 * 2)],
    ]
    assert "it would be served: 1 modules" in end.err


def test_json_has_the_modules_and_nothing_else_is_on_stdout(lorasrv, base, adapter):
    report = lorasrv("check", adapter(), "--base", base, "--json", "--dtype", "bfloat16").json
    assert (report["served"], report["kind"], report["base_model"], report["max_rank"]) == (True, "lora", "tiny", 4)
    assert report["modules"] == [
        {"module": MODULE, "kind": "lora", "rank": 4, "scale": 2.0, "num_bytes": 2 * 4 * HIDDEN * 2}
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


def test_what_else_an_adapter_brings_is_shown(lorasrv, base, tmp_path):
    tensors = {
        f"base_model.model.{MODULE}.lora_A.weight": torch.ones(4, HIDDEN),
        f"base_model.model.{MODULE}.lora_B.weight": torch.ones(HIDDEN, 4),
        f"base_model.model.{MODULE}.lora_B.bias": torch.ones(HIDDEN),
        "base_model.model.model.norm.weight": torch.ones(HIDDEN),
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(3, HIDDEN),
    }
    more = {"lora_bias": True, "modules_to_save": ["model.norm"], "trainable_token_indices": [5, 1, 9]}
    write_checkpoint(tmp_path / "adapter", CONFIG | more, tensors)
    end = lorasrv("check", tmp_path / "adapter", "--base", base, "--dtype", "float32")
    assert end.code == 0
    rows = 3 * HIDDEN * 4 + 32 * 4
    lines = {line.split()[0]: line.split()[1:] for line in end.out.splitlines()[1:]}
    assert lines == {
        MODULE: ["lora", "+", "bias", "4", "2", str((2 * 4 + 1) * HIDDEN * 4)],
        # tied to the embedding, whose rows it follows
        "lm_head": ["3", "rows", "-", "-", str(rows)],
        "model.embed_tokens": ["3", "rows", "-", "-", str(rows)],
        "model.norm": ["weight", "-", "-", str(HIDDEN * 4)],
    }


def test_another_name_of_the_base_is_a_warning(lorasrv, base, adapter):
    path = adapter(base_model_name_or_path="org/Another-Model")
    end = lorasrv("check", path, "--base", base)
    assert end.code == 0
    assert "warning: its config names the base org/Another-Model" in end.err
    assert len(lorasrv("check", path, "--base", base, "--json").json["warnings"]) == 1


def test_the_name_of_the_base_may_be_its_folders(lorasrv, base, adapter):
    end = lorasrv("check", adapter(base_model_name_or_path=f"org/{base.name.upper()}"), "--base", base, "--json")
    assert end.json["warnings"] == []


def test_the_digest_of_another_base_is_a_refusal(lorasrv, base, adapter):
    path = adapter()
    digest = load_model(base, dtype=torch.float32).base.digest
    (path / "provenance.json").write_text(json.dumps({"base_digest": digest, "seed": 3}))
    assert lorasrv("check", path, "--base", base).code == 0
    (path / "provenance.json").write_text(json.dumps({"base_digest": "0" * 64}))
    end = lorasrv("check", path, "--base", base)
    assert end.code == 3
    assert f"trained on a base with digest 000000000000; this one has {digest[:12]}" in end.err
