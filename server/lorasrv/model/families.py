"""What sets one model family apart from another, as one table. Knows no files, and of tensors only their modules."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_QKVO = (*_QKV, "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture that is served: what its config may say, and what its layers have besides the weights."""

    model_type: str
    keys: frozenset[str] = frozenset()
    """Config keys it honours that not every family has."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes where a key is absent, as far as it differs from `DEFAULTS`."""
    biased: tuple[str, ...] = ()
    """Modules that always have a bias."""
    bias_keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Config key -> modules that have a bias where it is true."""
    qk_norm: bool = False
    """Whether every head of query and key has a norm."""

    def default(self, key: str) -> Any:
        """What an absent key means."""
        return self.defaults.get(key, DEFAULTS[key])


DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": None,  # as many as attention heads
    "head_dim": None,  # what the hidden size leaves for each attention head
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    # layers from max_window_layers on see only the last sliding_window positions, if use_sliding_window
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 0,
}
"""What an absent key means in most families."""

_QWEN_KEYS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})
_QWEN_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(
        model_type="llama",
        keys=frozenset({"attention_bias", "mlp_bias"}),
        bias_keys={"attention_bias": _QKVO, "mlp_bias": _MLP},
    ),
    "MistralForCausalLM": Family(
        model_type="mistral",
        keys=frozenset({"sliding_window"}),
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "use_sliding_window": True,
            "sliding_window": 4096,
        },
    ),
    "Qwen2ForCausalLM": Family(model_type="qwen2", keys=_QWEN_KEYS, defaults=_QWEN_DEFAULTS, biased=_QKV),
    "Qwen3ForCausalLM": Family(
        model_type="qwen3",
        keys=_QWEN_KEYS | {"attention_bias"},
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        bias_keys={"attention_bias": _QKVO},
        qk_norm=True,
    ),
}
"""Architecture, as `config.json` names it -> its family."""
