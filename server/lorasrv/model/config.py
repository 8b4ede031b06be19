"""What a `config.json` says about a model of a served family, in the spellings of transformers 4 and 5.

Every key is honoured, known to change nothing, or named in the refusal. What differs between families is in
`lorasrv.model.families`. Knows no tensors.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorasrv.errors import ModelLoadError
from lorasrv.model.families import DEFAULTS, FAMILIES, Family
from lorasrv.model.rope import RopeConfig, parse_rope

_LAYER_TYPES = _FULL, _SLIDING = "full_attention", "sliding_attention"
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_HONOURED = {
    *_SIZES,
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters", "architectures", "model_type", "quantization_config"),
    *("bos_token_id", "eos_token_id", "torch_dtype", "dtype", "layer_types"),
}
# keys whose only served value is the one that changes nothing
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "is_causal": (True,),
}
# about training, generation defaults, bookkeeping or the other library: nothing here changes a logit
_INERT = {
    *("transformers_version", "_name_or_path", "is_decoder", "use_cache", "initializer_range", "attention_dropout"),
    *("hidden_dropout", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id", "id2label"),
    *("label2id", "num_labels", "problem_type", "task_specific_params", "finetuning_task", "tokenizer_class"),
    *("prefix", "return_dict", "use_return_dict", "return_dict_in_generate", "output_scores"),
    *("output_attentions", "output_hidden_states", "torchscript", "chunk_size_feed_forward", "max_sequence_length"),
    *("max_length", "min_length", "do_sample", "num_beams", "num_beam_groups", "num_return_sequences"),
    *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "diversity_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "early_stopping", "forced_bos_token_id"),
    *("forced_eos_token_id", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "remove_invalid_values"),
    *(
        "exponential_decay_length_penalty",
        "tf_legacy_loss",
        "use_bfloat16",
        "tie_encoder_decoder",
        "attn_implementation",
    ),
    *("_attn_implementation", "_attn_implementation_autoset", "unsloth_fixed", "unsloth_version"),
    *("transformers.js_config", "dataset_name", "neftune_noise_alpha"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only model: sizes, positions, what its layers have, special tokens, how its checkpoint is stored."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    biased_modules: tuple[str, ...]
    """Linear layers of every decoder layer that have a bias, e.g. "self_attn.q_proj"."""
    qk_norm: bool
    """Whether every head of query and key has a norm."""
    windows: tuple[int, ...]
    """Per layer, how many positions a token sees, its own included; 0: all of them."""
    bos_id: int | None
    eos_ids: tuple[int, ...]
    stored_dtype: str
    """Name of the dtype the checkpoint claims, e.g. "bfloat16"."""

    def identity(self) -> str:
        """Canonical JSON of what changes a logit; part of the base's digest."""
        values = asdict(self)
        for key in ("bos_id", "eos_ids", "stored_dtype"):
            del values[key]
        return json.dumps(values, sort_keys=True)


def read_model_config(folder: Path) -> ModelConfig:
    """Reads `config.json` of a model folder.

    Raises:
        ModelLoadError: the file is missing or no JSON object, or wants what is not served; lists everything.
    """
    return parse_model_config(read_json(folder / "config.json"))


def parse_model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads the content of a `config.json`.

    Raises:
        ModelLoadError: it asks for something that is not served; lists everything.
    """
    config, reasons = inspect_model_config(raw)
    if config is None or reasons:
        raise ModelLoadError(reasons)
    return config


def inspect_model_config(raw: Mapping[str, Any]) -> tuple[ModelConfig | None, list[str]]:
    """Reads the content of a `config.json` as far as it goes.

    Returns:
        What it says, or None where it does not tell which tensors there are; and everything that is not served.
    """
    reasons: list[str] = []
    _check_quantization(raw.get("quantization_config"), reasons)
    family = _family(raw, reasons)
    if family is None:
        return None, reasons
    _check_other_keys(raw, family, reasons)
    values = {**DEFAULTS, **family.defaults, **{key: raw[key] for key in raw if key in _HONOURED | family.keys}}
    unshaped: list[str] = []
    config = _config(values, family, unshaped, reasons)
    return (None if unshaped else config), [*unshaped, *reasons]


def _config(values: Mapping[str, Any], family: Family, unshaped: list[str], reasons: list[str]) -> ModelConfig:
    """Names in `unshaped` what leaves the tensors unknown, in `reasons` everything else that is not served."""
    sizes = {key: _size(values, key, unshaped) for key in _SIZES}
    num_heads, num_kv_heads, head_size = _heads(values, sizes, unshaped)
    max_positions = _size(values, "max_position_embeddings", reasons, default=family.default("max_position_embeddings"))
    return ModelConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        max_position_embeddings=max_positions,
        rms_norm_eps=_epsilon(values, reasons),
        rope=parse_rope(values, max_position_embeddings=max_positions, reasons=reasons),
        tie_word_embeddings=_flag(values, "tie_word_embeddings", unshaped),
        biased_modules=_biased_modules(values, family, unshaped),
        qk_norm=family.qk_norm,
        windows=_windows(values, family, sizes["num_hidden_layers"], reasons),
        bos_id=next(iter(parse_token_ids("bos_token_id", values.get("bos_token_id"), reasons)), None),
        eos_ids=parse_token_ids("eos_token_id", values.get("eos_token_id"), reasons),
        stored_dtype=str(values.get("dtype") or values.get("torch_dtype") or "float32"),
    )


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ModelLoadError: the file is missing, no JSON, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelLoadError([f"{path} cannot be read: {error.strerror}"]) from error
    except ValueError as error:
        raise ModelLoadError([f"{path} is not JSON: {error}"]) from error
    if not isinstance(content, dict):
        raise ModelLoadError([f"{path} must hold a JSON object"])
    return content


def parse_token_ids(key: str, value: object, reasons: list[str]) -> tuple[int, ...]:
    """One id, a list of ids or nothing, as a tuple; anything else is named in `reasons`."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in values):
        reasons.append(f"{key} must be a token id or a list of them, got {json.dumps(value)}")
        return ()
    return tuple(values)


def _family(raw: Mapping[str, Any], reasons: list[str]) -> Family | None:
    architectures = raw.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        reasons.append(f"architectures must be one of {', '.join(FAMILIES)}, got {json.dumps(architectures)}")
    elif raw.get("model_type", family.model_type) != family.model_type:
        reasons.append(f"model_type of {name} must be {family.model_type!r}, got {json.dumps(raw['model_type'])}")
    return family


def _check_other_keys(raw: Mapping[str, Any], family: Family, reasons: list[str]) -> None:
    for key, value in raw.items():
        if key in _HONOURED or key in family.keys or key in _INERT:
            continue
        if key in _FIXED:
            if value is not None and value not in _FIXED[key]:
                reasons.append(f"{key} = {json.dumps(value)} is not served; only {json.dumps(_FIXED[key][-1])} is")
        elif value not in (None, False, "", 0) and value != {} and value != []:
            reasons.append(f"{key} = {json.dumps(value)} is not honoured")


def _heads(values: Mapping[str, Any], sizes: Mapping[str, int], reasons: list[str]) -> tuple[int, int, int]:
    """Numbers of query heads and of KV heads, and the size of a head."""
    num_heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    num_kv_heads = _size(values, "num_key_value_heads", reasons, default=num_heads)
    if num_heads % num_kv_heads:
        reasons.append(f"num_attention_heads {num_heads} must be a multiple of num_key_value_heads {num_kv_heads}")
    if values.get("head_dim") is None and hidden % num_heads:
        reasons.append(f"hidden_size {hidden} must be a multiple of num_attention_heads {num_heads}")
    head_size = _size(values, "head_dim", reasons, default=max(1, hidden // num_heads))
    if head_size % 2:
        reasons.append(f"the head size must be even for rotary positions, got {head_size}")
    return num_heads, num_kv_heads, head_size


def _biased_modules(values: Mapping[str, Any], family: Family, reasons: list[str]) -> tuple[str, ...]:
    asked = [modules for key, modules in family.bias_keys.items() if _flag(values, key, reasons)]
    return (*family.biased, *(module for modules in asked for module in modules))


def _windows(values: Mapping[str, Any], family: Family, num_layers: int, reasons: list[str]) -> tuple[int, ...]:
    in_use = _flag(values, "use_sliding_window", reasons) and values["sliding_window"] is not None
    window = _size(values, "sliding_window", reasons) if in_use else 0
    first = values["max_window_layers"]
    if not isinstance(first, int):
        reasons.append(f"max_window_layers must be an integer, got {json.dumps(first)}")
        return ()
    types = [_SLIDING if window and layer >= first else _FULL for layer in range(num_layers)]
    stated = values.get("layer_types") or types
    if not isinstance(stated, list) or len(stated) != num_layers or not all(kind in _LAYER_TYPES for kind in stated):
        reasons.append(f"layer_types must be {num_layers} of {', '.join(_LAYER_TYPES)}, got {json.dumps(stated)}")
        return ()
    if _SLIDING in stated and not window:
        reasons.append(f"layer_types has {_SLIDING}, but no sliding_window is in use")
    elif stated != types and "layer_types" not in family.keys:
        reasons.append(f"layer_types must be {types[0]} in all layers of this family, got {json.dumps(stated)}")
    return tuple(window if kind == _SLIDING else 0 for kind in stated)


def _epsilon(values: Mapping[str, Any], reasons: list[str]) -> float:
    epsilon = values["rms_norm_eps"]
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 <= epsilon < math.inf:
        reasons.append(f"rms_norm_eps must be a number of at least 0, got {json.dumps(epsilon)}")
        return 0.0
    return float(epsilon)


def _flag(values: Mapping[str, Any], key: str, reasons: list[str]) -> bool:
    value = values[key]
    if value is not None and not isinstance(value, bool):
        reasons.append(f"{key} must be true or false, got {json.dumps(value)}")
    return value is True


def _size(raw: Mapping[str, Any], key: str, reasons: list[str], *, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        reasons.append(f"{key} must be an integer above 0, got {json.dumps(value)}")
        return 1
    return value


def _check_quantization(raw: object, reasons: list[str]) -> None:
    """Names any quantization but double quantized NF4 of bitsandbytes; the tensors are checked when they are read."""
    if not raw:
        return
    if not isinstance(raw, Mapping) or raw.get("quant_method", "bitsandbytes") != "bitsandbytes":
        method = raw.get("quant_method") if isinstance(raw, Mapping) else raw
        reasons.append(f"quantization method {json.dumps(method)} is not served; bitsandbytes NF4 is")
    elif raw.get("load_in_8bit"):
        reasons.append("load_in_8bit: int8 checkpoints are not served; quantize the original weights to NF4")
    elif not raw.get("load_in_4bit"):
        reasons.append("quantization_config must have load_in_4bit, the only kind of bitsandbytes that is served")
    elif raw.get("bnb_4bit_quant_type", "fp4") != "nf4":
        reasons.append(f"bnb_4bit_quant_type must be 'nf4', got {json.dumps(raw.get('bnb_4bit_quant_type', 'fp4'))}")
    elif not raw.get("bnb_4bit_use_double_quant"):
        reasons.append("bnb_4bit_use_double_quant must be true; quantize the original weights with double quantization")
