"""PEFT's folders, read and written by us, are PEFT's again, bit for bit."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from lorasrv_adapters.checkpoint import write_checkpoint
from lorasrv_adapters.weights import read_weights
from peft import PeftModel
from peft_options import KINDS, OPTIONS, save_option
from safetensors.torch import load_file
from tiny_peft import new_base
from transformers import PreTrainedModel

SMALL = {"hidden_size": 32, "intermediate_size": 32}
CASES = [(kind, name) for kind in KINDS for name, option in OPTIONS.items() if kind in option.kinds]


@pytest.fixture(scope="module")
def bases() -> dict[bool, PreTrainedModel]:
    return {tied: new_base("qwen2", tied=tied, **SMALL) for tied in (False, True)}


@pytest.mark.parametrize(("kind", "name"), CASES, ids=["-".join(case) for case in CASES])
def test_peft_ours_peft(kind: str, name: str, bases: dict[bool, PreTrainedModel], tmp_path: Path) -> None:
    option = OPTIONS[name]
    base = bases[bool(option.tied)]
    save_option(copy.deepcopy(base), tmp_path / "theirs", kind=kind, option=option)
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    write_checkpoint(tmp_path / "ours", config, read_weights(tmp_path / "theirs"))
    theirs, ours = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("theirs", "ours"))
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text()) == config
    assert ours.keys() == theirs.keys()
    for tensor_name, tensor in theirs.items():
        assert ours[tensor_name].dtype == tensor.dtype
        assert torch.equal(ours[tensor_name], tensor)
    assert torch.equal(*(_logits(base, tmp_path / folder) for folder in ("theirs", "ours")))


@torch.inference_mode()
def _logits(base: PreTrainedModel, folder: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    logits: torch.Tensor = model(torch.arange(60, 70)[None]).logits
    return logits
