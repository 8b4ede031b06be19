"""Everything an adapter's config can say that changes what it does, for every kind, as PEFT itself allows it."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rsdora": {"use_dora": True, "use_rslora": True},
    "adalora": {},
}
ATTENTION = ["q_proj", "v_proj"]
LAYER = "model.layers.1.self_attn"
MASKS = {
    "model.layers.0.self_attn.q_proj": [True, False, True, True, False],
    "model.layers.0.self_attn.v_proj": [False] * 5,
    "model.layers.1.self_attn.q_proj": [True] * 5,
    "model.layers.1.self_attn.v_proj": [False, False, False, True, False],
}

Edit = Callable[[dict[str, Any], dict[str, Tensor]], dict[str, Tensor]]
"""Changes the saved config in place and returns the tensors to save."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to configure an adapter.

    Attributes:
        config: Arguments of PEFT's config, over `ATTENTION` as targets.
        kinds: The kinds that PEFT allows it for.
        tied: Whether it is about bases that tie their head to the embedding, or, if False, about the others.
        edit: What is done to the files that PEFT saved.
        masks: AdaLoRA's surviving rows.
    """

    config: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = tuple(KINDS)
    tied: bool | None = None
    edit: Edit | None = None
    masks: dict[str, list[bool]] | None = None


LOW_RANK = ("lora", "rslora", "dora", "rsdora")
WITHOUT_NORM = ("lora", "rslora")
WITH_NORM = ("dora", "rsdora")


def in_dtype(dtype: torch.dtype) -> Edit:
    return lambda _, tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}


def renamed(old: str, new: str) -> Edit:
    return lambda _, tensors: {
        name.removesuffix(old) + new if name.endswith(old) else name: tensor for name, tensor in tensors.items()
    }


def with_adapter_name(_: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The spelling of a state dict: the adapter's name before `.weight`, or at the end."""

    def spelled(name: str) -> str:
        if ".lora_" not in name or "magnitude" in name:
            return name
        stem, dot, last = name.rpartition(".")
        return f"{stem}.default.{last}" if last in ("weight", "bias") else f"{stem}{dot}{last}.default"

    return {spelled(name): tensor for name, tensor in tensors.items()}


def with_zeros(_: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if name.endswith("lora_E"):
            tensor[1::2] = 0
    return tensors


def minimal(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = {"peft_type", "target_modules", "r", "lora_alpha", "init_r", "use_dora", "use_rslora", "total_step"}
    for key in config.keys() - kept:
        del config[key]
    return tensors


TARGETS = {
    "list": Option(),
    "all-linear": Option(config={"target_modules": "all-linear"}),
    "regex": Option(config={"target_modules": r".*layers\.[01]\..*(q|gate|down)_proj"}),
    "paths": Option(config={"target_modules": [f"{LAYER}.q_proj", "model.layers.0.mlp.up_proj"]}),
    "exclude-list": Option(
        config={"target_modules": "all-linear", "exclude_modules": ["layers.0.mlp.up_proj", "o_proj"]}
    ),
    "exclude-regex": Option(config={"exclude_modules": r".*layers\.0\..*v_proj"}),
    "layers": Option(config={"layers_to_transform": [1]}),
    "layers-int": Option(config={"layers_to_transform": 0, "layers_pattern": "layers"}),
    "layers-pattern": Option(config={"layers_to_transform": [0, 1], "layers_pattern": ["h", "layers"]}),
    "head": Option(config={"target_modules": ["q_proj", "lm_head"]}),
    "embedding": Option(config={"target_modules": ["q_proj", "embed_tokens"]}, kinds=LOW_RANK),
    "head-embedding": Option(config={"target_modules": ["v_proj", "lm_head", "embed_tokens"]}, kinds=LOW_RANK),
    "only-embedding": Option(config={"target_modules": ["embed_tokens"]}, kinds=LOW_RANK),
    "regex-embedding": Option(config={"target_modules": r".*(embed_tokens|q_proj)"}, kinds=LOW_RANK),
}
SCALES = {
    "rank-1": Option(config={"r": 1, "init_r": 2, "lora_alpha": 3}),
    "rank-wide": Option(config={"r": 40, "init_r": 40}),
    "alpha-fraction": Option(config={"lora_alpha": 2.5}),
    "alpha-negative": Option(config={"lora_alpha": -6}, kinds=LOW_RANK),
    "rank-pattern": Option(config={"rank_pattern": {"layers.1.self_attn.q_proj": 3, r".*\.v_proj": 2}}, kinds=LOW_RANK),
    "alpha-pattern": Option(config={"alpha_pattern": {f"^{LAYER}.q_proj": 2, "q_proj": 9}}, kinds=LOW_RANK),
    "patterns": Option(
        config={
            "target_modules": [*ATTENTION, "down_proj", "lm_head"],
            "rank_pattern": {r"layers\.0\..*": 5, "layers.1.self_attn.v_proj": 2, "lm_head": 7},
            "alpha_pattern": {"lm_head": 3, "down_proj": 1.5},
        },
        kinds=LOW_RANK,
    ),
    "embedding-patterns": Option(
        config={
            "target_modules": ["q_proj", "embed_tokens"],
            "rank_pattern": {"embed_tokens": 3},
            "alpha_pattern": {"embed_tokens": 5},
        },
        kinds=LOW_RANK,
    ),
    "pruned": Option(kinds=("adalora",), masks=MASKS),
    "zeroed": Option(kinds=("adalora",), edit=with_zeros),
}
BIASES = {
    "bias-all": Option(config={"bias": "all"}),
    "bias-lora-only": Option(config={"bias": "lora_only", "target_modules": "all-linear"}),
    "lora-bias": Option(config={"lora_bias": True}, kinds=WITHOUT_NORM),
    "lora-bias-head": Option(config={"lora_bias": True, "target_modules": ["o_proj", "lm_head"]}, kinds=WITHOUT_NORM),
    "lora-bias-all": Option(config={"lora_bias": True, "bias": "all"}, kinds=WITHOUT_NORM),
    "lora-bias-lora-only": Option(config={"lora_bias": True, "bias": "lora_only"}, kinds=WITHOUT_NORM),
}
SAVED = {
    "saved-head": Option(config={"modules_to_save": ["lm_head"]}),
    "saved-embedding": Option(config={"modules_to_save": ["embed_tokens"]}),
    "saved-both": Option(config={"modules_to_save": ["lm_head", "embed_tokens"]}),
    "saved-norms": Option(config={"modules_to_save": ["norm"]}),
    "saved-some-norms": Option(config={"modules_to_save": ["layers.1.input_layernorm", "model.norm"]}),
    "saved-all-bias": Option(config={"modules_to_save": ["lm_head", "embed_tokens", "norm"], "bias": "all"}),
    "saved-not-targeted": Option(config={"modules_to_save": ["lm_head"], "target_modules": ["lm_head", "q_proj"]}),
    "saved-head-embedding-lora": Option(
        config={"modules_to_save": ["lm_head"], "target_modules": ["embed_tokens", "q_proj"]}, kinds=LOW_RANK
    ),
}
TOKENS = {
    "tokens": Option(config={"trainable_token_indices": [40, 7, 299, 65]}),
    "tokens-named": Option(config={"trainable_token_indices": {"embed_tokens": [65, 70], "lm_head": [3, 65]}}),
    "tokens-head": Option(config={"trainable_token_indices": {"lm_head": [12, 4]}}),
    "tokens-norm": Option(config={"trainable_token_indices": [7, 66], "modules_to_save": ["norm"]}),
    "tokens-saved-head": Option(
        config={"trainable_token_indices": [7, 66], "modules_to_save": ["lm_head"]}, tied=False
    ),
    "tokens-head-lora": Option(
        config={"trainable_token_indices": [9, 66], "target_modules": ["lm_head", "q_proj"]}, tied=False
    ),
}
TIED = {
    "tied-tokens": Option(config={"trainable_token_indices": [7, 66], "ensure_weight_tying": True}, tied=True),
    "tied-tokens-same": Option(
        config={"trainable_token_indices": {"embed_tokens": [65, 7], "lm_head": [65, 7]}}, tied=True
    ),
    "tied-tokens-head-lora": Option(
        config={"trainable_token_indices": [9, 66], "target_modules": ["lm_head", "q_proj"]},
        kinds=(*WITHOUT_NORM, "adalora"),
        tied=True,
    ),
    "tied-saved-embedding": Option(
        config={"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, tied=True
    ),
    "tied-saved-head": Option(config={"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, tied=True),
    "tied-saved-both": Option(
        config={"modules_to_save": ["lm_head", "embed_tokens", "norm"], "ensure_weight_tying": True}, tied=True
    ),
    "tied-embedding": Option(
        config={"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, kinds=LOW_RANK, tied=True
    ),
    "tied-head": Option(
        config={"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}, kinds=LOW_RANK, tied=True
    ),
    "tied-regex": Option(
        config={"target_modules": r".*(q_proj|embed_tokens)", "ensure_weight_tying": True}, kinds=LOW_RANK, tied=True
    ),
}
FILES = {
    "fp16": Option(edit=in_dtype(torch.float16)),
    "bf16": Option(config={"modules_to_save": ["norm"]}, edit=in_dtype(torch.bfloat16)),
    "adapter-name": Option(edit=with_adapter_name),
    "adapter-name-embedding": Option(
        config={"target_modules": ["embed_tokens", "v_proj"]}, edit=with_adapter_name, kinds=LOW_RANK
    ),
    "adapter-name-lora-bias": Option(config={"lora_bias": True}, edit=with_adapter_name, kinds=WITHOUT_NORM),
    "magnitude-weight": Option(
        edit=renamed(".lora_magnitude_vector", ".lora_magnitude_vector.weight"), kinds=WITH_NORM
    ),
    "magnitude-name": Option(
        edit=renamed(".lora_magnitude_vector", ".lora_magnitude_vector.default.weight"), kinds=WITH_NORM
    ),
    "minimal-config": Option(edit=minimal),
}
INERT = {
    "dropout": Option(config={"lora_dropout": 0.3}),
    "gaussian": Option(config={"init_lora_weights": "gaussian"}),
    "orthogonal": Option(config={"init_lora_weights": "orthogonal"}, kinds=LOW_RANK),
    "fan-in-fan-out": Option(config={"fan_in_fan_out": True}),
}
OPTIONS = TARGETS | SCALES | BIASES | SAVED | TOKENS | TIED | FILES | INERT


def save_option(model: PreTrainedModel, folder: Path, *, kind: str, option: Option, seed: int = 1) -> None:
    """Writes the PEFT folder of one kind and option, with random weights large enough to change every answer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, _config(kind, option))
        _randomize(adapted, seed)
        if option.masks is not None:
            masks = {f"{name}.lora_E": mask for name, mask in option.masks.items()}
            adapted.peft_config["default"].rank_pattern = masks
        adapted.save_pretrained(folder)
    if option.edit is not None:
        config_file, weights_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        config = json.loads(config_file.read_text())
        tensors = {name: tensor.contiguous() for name, tensor in option.edit(config, load_file(weights_file)).items()}
        config_file.write_text(json.dumps(config))
        save_file(tensors, weights_file, {"format": "pt"})


def _config(kind: str, option: Option) -> PeftConfig:
    values = {"target_modules": ATTENTION, "lora_alpha": 7, **KINDS[kind], **option.config}
    if kind == "adalora":
        values = {"init_r": 5, "target_r": 1, "total_step": 10, **values}
        values.pop("r", None)
        return AdaLoraConfig(**values)
    values = {"r": 4, **values}
    values.pop("init_r", None)
    return LoraConfig(**values)


def _randomize(model: PeftModel, seed: int) -> None:
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "magnitude" in name:
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)
        elif "lora_E" in name:
            parameter.data.normal_().mul_(torch.rand_like(parameter) < 0.7)
        elif "lora_" in name:
            parameter.data.normal_(0, 0.15)
        else:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
