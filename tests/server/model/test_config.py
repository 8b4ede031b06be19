"""What `config.json` and `generation_config.json` mean, in both spellings, and what is refused."""

import json

import pytest
from lorasrv.errors import ModelLoadError
from lorasrv.model.config import parse_model_config, read_model_config
from lorasrv.model.generation import parse_generation_defaults, read_generation_defaults
from lorasrv.model.rope import RopeConfig
from transformers import LlamaConfig

OLD = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "transformers_version": "4.43.0",
    "use_cache": True,
    "tie_word_embeddings": True,
}


def test_old_spelling():
    config = parse_model_config(OLD)
    assert (config.num_heads, config.num_kv_heads, config.head_size) == (4, 2, 16)
    assert config.rope == RopeConfig(kind="llama3", theta=500000.0, factor=8.0, original_max_position_embeddings=512)
    assert config.eos_ids == (2, 3)
    assert config.bos_id == 1
    assert config.tie_word_embeddings
    assert config.stored_dtype == "bfloat16"


def test_both_spellings_mean_the_same():
    new = {key: value for key, value in OLD.items() if not key.startswith("rope_") and key != "torch_dtype"}
    new["rope_parameters"] = {**OLD["rope_scaling"], "rope_theta": 500000.0}
    new["dtype"] = "bfloat16"
    assert parse_model_config(new) == parse_model_config(OLD)


@pytest.mark.parametrize("rope", [None, {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}])
def test_what_transformers_writes_is_read(tmp_path, rope):
    LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters=rope, head_dim=32, architectures=["LlamaForCausalLM"]
    ).save_pretrained(tmp_path)
    config = read_model_config(tmp_path)
    assert config.head_size == 32
    assert config.num_kv_heads == 4
    assert config.rope.kind == ("linear" if rope else "default")


def test_heads_need_not_fill_the_hidden_size_where_their_size_is_given():
    assert parse_model_config({**OLD, "hidden_size": 62, "head_dim": 16}).head_size == 16
    with pytest.raises(ModelLoadError, match="multiple"):
        parse_model_config({**OLD, "hidden_size": 62})


def test_oldest_rope_spelling():
    config = parse_model_config({**OLD, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert (config.rope.kind, config.rope.factor) == ("linear", 2.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("pretraining_tp", 2),
        ("sliding_window", 4096),
        ("architectures", ["MistralForCausalLM"]),
        ("model_type", "mistral"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_scaling", {"rope_type": "linear"}),
        ("rope_scaling", {**OLD["rope_scaling"], "partial_rotary_factor": 0.5}),
        ("some_new_multiplier", 0.7),
        ("num_key_value_heads", 3),
        ("head_dim", 15),
        ("vocab_size", None),
        ("eos_token_id", "</s>"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    ],
)
def test_what_changes_the_result_is_refused(key, value):
    with pytest.raises(ModelLoadError):
        parse_model_config({**OLD, key: value})


def test_one_refusal_names_everything():
    wrong = {**OLD, "attention_bias": True, "hidden_act": "gelu", "rope_scaling": {"rope_type": "yarn"}, "alpha": 2}
    with pytest.raises(ModelLoadError) as caught:
        parse_model_config(wrong)
    assert len(caught.value.reasons) == 4
    for name in ("attention_bias", "hidden_act", "yarn", "alpha"):
        assert name in str(caught.value)


def test_contradicting_spellings_are_refused():
    with pytest.raises(ModelLoadError, match="contradict"):
        parse_model_config({**OLD, "rope_parameters": {**OLD["rope_scaling"], "factor": 32.0}})


def test_config_file_must_be_an_object(tmp_path):
    with pytest.raises(ModelLoadError, match="cannot be read"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelLoadError, match="object"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="not JSON"):
        read_model_config(tmp_path)


def test_identity_ignores_what_changes_no_logit():
    config = parse_model_config(OLD)
    assert config.identity() == parse_model_config({**OLD, "eos_token_id": 7, "torch_dtype": "float32"}).identity()
    assert config.identity() != parse_model_config({**OLD, "rms_norm_eps": 1e-6}).identity()


def test_generation_defaults(tmp_path):
    assert read_generation_defaults(tmp_path).temperature is None
    raw = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [5, 6], "repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text(json.dumps(raw))
    defaults = read_generation_defaults(tmp_path)
    assert (defaults.temperature, defaults.top_k, defaults.top_p) == (0.6, None, 0.9)
    assert defaults.eos_ids == (5, 6)
    assert defaults.not_applied == ("repetition_penalty",)


def test_generation_defaults_of_a_greedy_model():
    assert parse_generation_defaults({"do_sample": False, "temperature": 0.6, "eos_token_id": 2}).temperature == 0.0


def test_generation_defaults_of_the_wrong_kind_are_named_together():
    with pytest.raises(ModelLoadError) as caught:
        parse_generation_defaults({"temperature": "hot", "top_k": -1, "eos_token_id": "</s>"})
    assert len(caught.value.reasons) == 3
