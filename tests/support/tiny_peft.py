"""A tiny random base of every family and PEFT adapters of every kind on it, as the folders their libraries write."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 300
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 40},
    "qwen2": {},
    # heads of another size than hidden_size / num_attention_heads
    "qwen3": {"head_dim": 48},
}


def save_base(folder: Path, family: str = "llama", *, tied: bool = False, **options: Any) -> Path:
    """Writes a random base of two layers with grouped heads, and a byte-level tokenizer.

    Args:
        folder: is there already.
        family: one of `FAMILIES`; Mistral's window of 40 positions is shorter than many prompts.
        tied: whether the head is the embedding.
        options: more keys of the config, e.g. `attention_bias=True`, or `use_sliding_window=True, sliding_window=40,
            max_window_layers=1` for a Qwen of which one layer has a window.
    """
    new_base(family, tied=tied, **options).save_pretrained(folder)
    _save_tokenizer(folder)
    return folder


def new_base(family: str = "llama", *, tied: bool = False, **options: Any) -> PreTrainedModel:
    """The model `save_base` writes: always the same one for the same arguments; biases and norms are random too."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    config = AutoConfig.for_model(family, **{**sizes, "tie_word_embeddings": tied, **FAMILIES[family], **options})
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.2)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data.normal_(0.0 if name.endswith(".bias") else 1.0, 0.2)
    return model


def _save_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate([*alphabet, "<s>", "</s>"])}
    vocabulary |= {f"<unused{index}>": index for index in range(len(vocabulary), VOCAB_SIZE)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


def save_adapter(base_folder: Path, folder: Path, *, kind: str, rank: int, seed: int) -> Path:
    """Writes a PEFT folder with random weights large enough to change every answer."""
    torch.manual_seed(seed)
    targets = LINEARS if seed % 2 else ["q_proj", "v_proj", "down_proj"]
    config: PeftConfig
    if kind == "adalora":
        config = AdaLoraConfig(init_r=rank, target_r=1, total_step=10, lora_alpha=2 * rank, target_modules=targets)
    else:
        config = LoraConfig(
            r=rank, lora_alpha=rank, use_rslora=kind == "rslora", use_dora=kind == "dora", target_modules=targets
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), config)
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                parameter.data.normal_().mul_(torch.rand_like(parameter) < 0.6)
            elif "magnitude" in name:
                parameter.data.mul_(torch.rand_like(parameter) + 0.5)
            elif "lora_" in name:
                parameter.data.normal_(0, 0.15)
        model.save_pretrained(folder)
    return folder
