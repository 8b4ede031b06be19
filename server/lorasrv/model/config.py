"""What a `config.json` says about a Llama model, in the spellings of transformers 4 and 5.

Every key is honoured, known to change nothing, or named in the refusal. Knows no tensors.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorasrv.errors import ModelLoadError
from lorasrv.model.rope import RopeConfig, parse_rope

ARCHITECTURE = "LlamaForCausalLM"

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_HONOURED = {
    *_SIZES,
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters", "architectures", "model_type", "quantization_config"),
    *("bos_token_id", "eos_token_id", "torch_dtype", "dtype"),
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
    """A Llama model: sizes, positions, special tokens, and how its checkpoint is stored."""

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
    reasons: list[str] = []
    _check_architecture(raw, reasons)
    _check_other_keys(raw, reasons)
    sizes = {key: _size(raw, key, reasons) for key in _SIZES}
    heads = sizes["num_attention_heads"]
    kv_heads = _size(raw, "num_key_value_heads", reasons, default=heads)
    if heads % kv_heads:
        reasons.append(f"num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}")
    if raw.get("head_dim") is None and sizes["hidden_size"] % heads:
        reasons.append(f"hidden_size {sizes['hidden_size']} must be a multiple of num_attention_heads {heads}")
    head_size = _size(raw, "head_dim", reasons, default=max(1, sizes["hidden_size"] // heads))
    if head_size % 2:
        reasons.append(f"the head size must be even for rotary positions, got {head_size}")
    max_positions = _size(raw, "max_position_embeddings", reasons, default=2048)
    rope = parse_rope(raw, max_position_embeddings=max_positions, reasons=reasons)
    epsilon = raw.get("rms_norm_eps", 1e-6)
    if not isinstance(epsilon, int | float):
        reasons.append(f"rms_norm_eps must be a number, got {json.dumps(epsilon)}")
    _check_quantization(raw.get("quantization_config"), reasons)
    bos_ids = parse_token_ids("bos_token_id", raw.get("bos_token_id"), reasons)
    eos_ids = parse_token_ids("eos_token_id", raw.get("eos_token_id"), reasons)
    if reasons:
        raise ModelLoadError(reasons)
    return ModelConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        max_position_embeddings=max_positions,
        rms_norm_eps=float(epsilon),
        rope=rope,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        bos_id=bos_ids[0] if bos_ids else None,
        eos_ids=eos_ids,
        stored_dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
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


def _check_architecture(raw: Mapping[str, Any], reasons: list[str]) -> None:
    architectures = raw.get("architectures")
    if architectures != [ARCHITECTURE]:
        reasons.append(f"architectures must be [{ARCHITECTURE!r}], got {json.dumps(architectures)}")
    if raw.get("model_type", "llama") != "llama":
        reasons.append(f"model_type must be 'llama', got {json.dumps(raw['model_type'])}")


def _check_other_keys(raw: Mapping[str, Any], reasons: list[str]) -> None:
    for key, value in raw.items():
        if key in _HONOURED or key in _INERT:
            continue
        if key in _FIXED:
            if value is not None and value not in _FIXED[key]:
                reasons.append(f"{key} = {json.dumps(value)} is not served; only {json.dumps(_FIXED[key][-1])} is")
        elif key == "layer_types" and value and set(value) == {"full_attention"}:
            continue
        elif value not in (None, False, "", 0) and value != {} and value != []:
            reasons.append(f"{key} = {json.dumps(value)} is not honoured")


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
    elif raw.get("load_in_8bit") or not raw.get("load_in_4bit"):
        reasons.append("bitsandbytes 8-bit checkpoints are not served; quantize the original weights to NF4")
    elif raw.get("bnb_4bit_quant_type", "fp4") != "nf4":
        reasons.append(f"bnb_4bit_quant_type must be 'nf4', got {json.dumps(raw.get('bnb_4bit_quant_type', 'fp4'))}")
    elif not raw.get("bnb_4bit_use_double_quant"):
        reasons.append("bnb_4bit_use_double_quant must be true; quantize the original weights with double quantization")
