"""Tiny PEFT adapters that become plain LoRA, written as PEFT writes them."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

TOKENS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))


def new_llama(*, tied: bool = False, biased: bool = False) -> LlamaForCausalLM:
    """A random Llama of two layers, the same at every call."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attention_bias=biased,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.2)
    return model


def logits(model: nn.Module) -> Tensor:
    """What a model answers to `TOKENS`."""
    with torch.inference_mode():
        return model.eval()(TOKENS).logits


def save_before_and_after(folder: Path, base: LlamaForCausalLM, **options: object) -> PeftModel:
    """Write `folder`/initial and `folder`/trained, between them only noise; returns the model, on its changed base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, _prepared(base, options))
        torch.manual_seed(4)
        model.save_pretrained(folder / "initial")
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.data *= 0.5 + torch.rand_like(parameter)
            elif parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.1
        model.save_pretrained(folder / "trained")
    return model


def save_adalora(
    folder: Path, *, masks: Mapping[str, list[bool]] | None, biased: bool = False, **options: object
) -> None:
    """Write an AdaLoRA adapter on two modules a layer, pruned by masks for each module, or not pruned."""
    schedule = {"init_r": 5, "target_r": 2, "lora_alpha": 7, "total_step": 10}
    config = AdaLoraConfig(target_modules=["q_proj", "v_proj"], **schedule, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(new_llama(biased=biased), config)
        torch.manual_seed(5)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.3)
        if masks is not None:
            model.peft_config["default"].rank_pattern = {f"{name}.lora_E": mask for name, mask in masks.items()}
        model.save_pretrained(folder)


def load(folder: Path, *, biased: bool = False) -> PeftModel:
    """The adapter in PEFT, on the base as it was."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(new_llama(biased=biased), folder)


def _prepared(base: LlamaForCausalLM, options: Mapping[str, object]) -> LoraConfig:
    """The config, and on the base's layers what CorDA and LoRA-GA look for there."""
    config = LoraConfig(**options)
    if config.init_lora_weights == "corda":
        config.corda_config = CordaConfig()
        _attach_eigens(base, config)
    elif config.init_lora_weights == "lora_ga":
        config.lora_ga_config = LoraGAConfig()
        preprocess_loraga(base, config, lambda: base(TOKENS, labels=TOKENS).loss.backward())
    return config


def _attach_eigens(base: LlamaForCausalLM, config: LoraConfig) -> None:
    """What `preprocess_corda`, which needs one more package, would find: W C = U S V, and V without C."""
    for name, module in base.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
        x = torch.randn(256, module.in_features)
        covariance = x.T @ x / len(x)
        u, s, v = torch.linalg.svd(module.weight.detach() @ covariance, full_matrices=False)
        v = torch.linalg.solve(covariance, v.T)
        module.eigens = SimpleNamespace(U_WC=u[:, :rank], S_WC=s[:rank], V_WC=v[:, :rank])
