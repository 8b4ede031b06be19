"""What must hold of any bytes as an adapter's config: refused with bounded reasons, or read once and for all."""

import json

from lorasrv_adapters.config import AdapterConfig, examine_adapter_config, parse_adapter_config
from lorasrv_adapters.errors import AdapterCorruptError, AdapterError, AdapterIncompatibleError

LONGEST_MESSAGE = 40_000
"""Twenty reasons, of which each may quote one pattern of 1024 characters."""

_MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head", "q_proj"]

_CONFIGS: list[dict[str, object]] = [
    {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 4, "lora_alpha": 8.5, "bias": "none"},
    {"peft_type": "LORA", "target_modules": r".*\.(q|up)_proj", "use_dora": True, "use_rslora": True, "r": 1},
    {"peft_type": "LORA", "target_modules": "all-linear", "exclude_modules": ["lm_head"], "init_lora_weights": "pissa"},
    {"peft_type": "LORA", "target_modules": ["q"], "layers_to_transform": [0, 1], "layers_pattern": "layers|h"},
    {"peft_type": "LORA", "target_modules": ["q"], "rank_pattern": {"q": 2, "(": 3}, "alpha_pattern": {"q": 1e3}},
    {
        "peft_type": "ADALORA",
        "target_modules": ["q"],
        "init_r": 2,
        "total_step": 9,
        "rank_pattern": {"q.lora_E": [True, False]},
    },
    {"peft_type": "IA3", "auto_mapping": {"parent_library": "os"}, "unknown": [{"deep": [[]]}], "zero": 0},
    {"peft_type": "LORA", "target_modules": ["q"], "modules_to_save": ["lm_head"], "trainable_token_indices": [1]},
]
_JSON_OF_A_LORA = json.dumps(_CONFIGS[0])
SEEDS = [
    *(json.dumps(config).encode() for config in _CONFIGS),
    b'{"peft_type":"LORA","peft_type":"LORA"}',
    b'{"peft_type":"LORA","target_modules":["\\ud800"],"r":1e999,"lora_alpha":NaN}',
    b'{"peft_type":"LORA","target_modules":["q"],"lora_alpha":' + b"9" * 400 + b"}",
    _JSON_OF_A_LORA.encode("utf-16"),
    b"\xef\xbb\xbf" + _JSON_OF_A_LORA.encode(),
    b'{"peft_type":' + b"[" * 30 + b"]" * 30 + b"}",
]


def check_config(content: bytes) -> bool:
    """Check one config; returns whether it is accepted."""
    ours, again = _parse(content), _parse(content)
    if isinstance(ours, str):
        assert ours == again
        return False
    assert ours == again
    assert isinstance(again, AdapterConfig)
    assert ours.canonical() == again.canonical()
    assert ours.targets.select(_MODULES, all_linear=_MODULES) <= set(_MODULES)
    # what is written from it is JSON for every reader, and means the same
    decoded = json.loads(content.decode())
    assert parse_adapter_config(decoded) == ours
    assert parse_adapter_config(json.dumps(decoded, allow_nan=False).encode()) == ours
    return True


def _parse(content: bytes) -> AdapterConfig | str:
    try:
        config, reasons = examine_adapter_config(content)
    except AdapterCorruptError as error:
        return _message(error)
    if config is None or reasons:
        assert reasons, "refused without a reason"
        assert len(reasons) <= 1000
        return _message(AdapterIncompatibleError(reasons))
    return config


def _message(error: AdapterError) -> str:
    text = str(error)
    assert 0 < len(text) <= LONGEST_MESSAGE
    text.encode()
    return text
