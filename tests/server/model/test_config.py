"""What `config.json` and `generation_config.json` mean, in both spellings, and what is refused."""

import json

import pytest
from lorasrv.errors import ModelLoadError
from lorasrv.model.config import parse_model_config, read_model_config
from lorasrv.model.families import FAMILIES
from lorasrv.model.generation import parse_generation_defaults, read_generation_defaults
from lorasrv.model.rope import RopeConfig
from transformers import AutoConfig, LlamaConfig

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
        ("attention_bias", "yes"),
        ("mlp_bias", 1),
        ("tie_word_embeddings", "no"),
        ("rms_norm_eps", True),
        ("hidden_act", "gelu"),
        ("pretraining_tp", 2),
        ("sliding_window", 4096),
        ("use_sliding_window", True),
        ("max_window_layers", 1),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("architectures", ["MistralForCausalLM"]),
        ("architectures", ["LlamaForCausalLM", "MistralForCausalLM"]),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", None),
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
    wrong = {**OLD, "attention_bias": "yes", "hidden_act": "gelu", "rope_scaling": {"rope_type": "yarn"}, "alpha": 2}
    with pytest.raises(ModelLoadError) as caught:
        parse_model_config(wrong)
    assert len(caught.value.reasons) == 4
    for name in ("attention_bias", "hidden_act", "yarn", "alpha"):
        assert name in str(caught.value)


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_a_window_without_its_size_and_first_layer_is_what_transformers_takes(architecture):
    raw = {**QWEN, "architectures": [architecture], "model_type": FAMILIES[architecture].model_type}
    raw |= {"num_hidden_layers": 30, "sliding_window": None, "max_window_layers": None}
    raw = {key: value for key, value in raw.items() if value is not None}
    theirs = AutoConfig.for_model(raw["model_type"], num_hidden_layers=30, use_sliding_window=True)
    expected = tuple(theirs.sliding_window if kind == SLIDING else 0 for kind in theirs.layer_types)
    assert set(expected) == {0, 4096}
    assert parse_model_config(raw).windows == expected


def test_an_unknown_architecture_is_named_with_those_that_are_served():
    wrong = {"architectures": ["Gemma3ForCausalLM"], "quantization_config": {"quant_method": "awq"}, "d_model": 64}
    with pytest.raises(ModelLoadError) as caught:
        parse_model_config(wrong)
    assert len(caught.value.reasons) == 2
    for name in ("Gemma3ForCausalLM", *FAMILIES, "awq"):
        assert name in str(caught.value)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_absent_keys_mean_what_transformers_takes(architecture):
    family = FAMILIES[architecture]
    sizes = {
        "vocab_size": 320,
        "hidden_size": 8192,
        "intermediate_size": 128,
        "num_hidden_layers": 30,
        "num_attention_heads": 32,
    }
    config = parse_model_config({"architectures": [architecture], **sizes})
    theirs = AutoConfig.for_model(family.model_type, **sizes)
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.head_size == getattr(theirs, "head_dim", 8192 // 32)
    assert config.max_position_embeddings == theirs.max_position_embeddings
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.rope == RopeConfig(kind="default", theta=theirs.rope_parameters["rope_theta"])
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    assert set(config.windows) == {getattr(theirs, "sliding_window", None) or 0}
    assert not any(getattr(theirs, key) for key in family.bias_keys)
    assert config.biased_modules == family.biased


QWEN = {key: value for key, value in OLD.items() if key not in ("attention_bias", "mlp_bias")} | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_hidden_layers": 4,
    "use_sliding_window": True,
    "sliding_window": 16,
    "max_window_layers": 3,
}
MISTRAL = {key: value for key, value in QWEN.items() if key not in ("use_sliding_window", "max_window_layers")} | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
}
FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("raw", "windows"),
    [
        (QWEN, (0, 0, 0, 16)),
        ({**QWEN, "max_window_layers": 0}, (16, 16, 16, 16)),
        ({**QWEN, "max_window_layers": 4}, (0, 0, 0, 0)),
        ({**QWEN, "use_sliding_window": False}, (0, 0, 0, 0)),
        ({**QWEN, "use_sliding_window": False, "sliding_window": "unused"}, (0, 0, 0, 0)),
        ({**QWEN, "sliding_window": None}, (0, 0, 0, 0)),
        ({**QWEN, "layer_types": [SLIDING, FULL, FULL, SLIDING]}, (16, 0, 0, 16)),
        ({**QWEN, "layer_types": None}, (0, 0, 0, 16)),
        (MISTRAL, (16, 16, 16, 16)),
        ({**MISTRAL, "sliding_window": None}, (0, 0, 0, 0)),
        ({**MISTRAL, "layer_types": [SLIDING] * 4}, (16, 16, 16, 16)),
    ],
)
def test_windows_of_layers(raw, windows):
    assert parse_model_config(raw).windows == windows


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ({**QWEN, "sliding_window": 0}, "sliding_window"),
        ({**MISTRAL, "sliding_window": "4096"}, "sliding_window"),
        ({**QWEN, "use_sliding_window": 1}, "use_sliding_window"),
        ({**QWEN, "max_window_layers": None}, "max_window_layers"),
        ({**QWEN, "layer_types": [FULL]}, "layer_types"),
        ({**QWEN, "layer_types": [FULL, FULL, FULL, "linear_attention"]}, "linear_attention"),
        ({**QWEN, "layer_types": 4}, "layer_types"),
        ({**QWEN, "layer_types": [SLIDING] * 4, "use_sliding_window": False}, "layer_types"),
        ({**MISTRAL, "layer_types": [FULL, FULL, FULL, SLIDING]}, "layer_types"),
        ({**MISTRAL, "max_window_layers": 2}, "max_window_layers"),
        ({**MISTRAL, "attention_bias": True}, "attention_bias"),
        ({**QWEN, "mlp_bias": True}, "mlp_bias"),
    ],
)
def test_what_a_family_does_not_have_is_refused(raw, name):
    with pytest.raises(ModelLoadError) as caught:
        parse_model_config(raw)
    assert len(caught.value.reasons) == 1
    assert name in str(caught.value)


def test_biases_of_modules():
    attention = tuple(f"self_attn.{name}_proj" for name in "qkvo")
    mlp = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
    assert parse_model_config({**OLD, "attention_bias": True, "mlp_bias": True}).biased_modules == (*attention, *mlp)
    assert parse_model_config({**OLD, "mlp_bias": True}).biased_modules == mlp
    assert parse_model_config(QWEN).biased_modules == attention[:3]
    qwen3 = {**QWEN, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": True}
    assert parse_model_config(qwen3).biased_modules == attention


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
    assert parse_model_config(QWEN).identity() != parse_model_config({**QWEN, "max_window_layers": 2}).identity()


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
