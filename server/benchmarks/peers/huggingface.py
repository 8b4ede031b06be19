"""The lanes of transformers and PEFT, in bfloat16 or with bitsandbytes' NF4: a plain greedy loop over `forward`."""

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache


def load(base: Path, *, dtype: torch.dtype, nf4: bool) -> Any:
    """The base, in 4 bits with double quantization if `nf4`."""
    options = {}
    if nf4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, device_map="cpu", **options).eval()


def with_adapters(model: Any, adapters: Sequence[Path]) -> Any:
    """The same weights once more, with all adapters on them; `model` stays as it is."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    # by default the adapters would be widened to float32
    options = {"autocast_adapter_dtype": False}
    adapted = PeftModel.from_pretrained(twin, adapters[0], adapter_name="a0", **options)
    for index, folder in enumerate(adapters[1:], start=1):
        adapted.load_adapter(folder, adapter_name=f"a{index}", **options)
    return adapted.eval()


class HuggingFaceLane:
    """A batch [B, T] that is prefilled and then decoded, step by step; with adapters, sequence i has the i-th."""

    def __init__(self, model: Any, prompts: Tensor, *, adapters: bool) -> None:
        self._model = model
        self._prompts = prompts
        self._options = {"adapter_names": [f"a{index}" for index in range(len(prompts))]} if adapters else {}
        self._generated: list[Tensor] = []

    @torch.inference_mode()
    def prefill(self) -> Tensor:
        """Starts the batch anew; the logits [B, V] of its first tokens."""
        self._cache = DynamicCache()
        self._generated = []
        return self._forward(self._prompts)

    @torch.inference_mode()
    def step(self) -> None:
        """One decode step."""
        self._forward(self._generated[-1])

    @property
    def tokens(self) -> list[list[int]]:
        """Generated tokens of each sequence."""
        rows: list[list[int]] = torch.cat(self._generated, dim=1).tolist()
        return rows

    def _forward(self, tokens: Tensor) -> Tensor:
        output = self._model(
            input_ids=tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1, **self._options
        )
        logits: Tensor = output.logits[:, -1].float()
        self._generated.append(logits.argmax(-1, keepdim=True))
        return logits
