"""A transformers model with the weights a server holds: every decoder linear as its NF4 form decodes."""

from pathlib import Path

import torch
from lorasrv.model.decoder import DecoderModel
from transformers import AutoModelForCausalLM, PreTrainedModel


def as_served(folder: Path, model: DecoderModel) -> PreTrainedModel:
    """The model of `folder` in float32, with the weights of `model`, which was loaded from it."""
    oracle: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in model.base.modules.items():
        if module.kind == "linear":
            rows = model.base.weight_rows(name, 0, module.out_features)
            oracle.get_submodule(name).weight.data = rows
    return oracle.eval()
