"""PEFT is the oracle: of the weights where it merges itself, of the answers for everything that is served."""

import pytest
import torch
from lorasrv.errors import MergeError
from peft_options import KINDS, OPTIONS, Option
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

# fp32 on both sides; the weights are below 4, one product of rank 40 at most is added
WEIGHT_TOLERANCE = 1e-5
# logits of these models reach 30, sums run over 192 products in another order
LOGIT_TOLERANCE = 1e-4

MERGED_BY_PEFT = [
    "list",
    "all-linear",
    "head",
    "rank-wide",
    "alpha-negative",
    "rank-pattern",
    "alpha-pattern",
    "patterns",
    "pruned",
    "saved-some-norms",
]
CASES = [(name, kind) for name in MERGED_BY_PEFT for kind in KINDS if kind in OPTIONS[name].kinds]
NO_BIAS_THERE = "lora-bias-head"
# every option once, the kinds in turn
ANSWERS = [
    (name, option.kinds[place % len(option.kinds)], tied)
    for place, (name, option) in enumerate(OPTIONS.items())
    for tied in (False, True)
    if name != NO_BIAS_THERE and option.tied in (None, tied)
]


@pytest.mark.parametrize(("name", "kind"), CASES, ids=["-".join(case) for case in CASES])
def test_weights_are_those_of_merge_and_unload(base, merged, tmp_path, name, kind):
    llama = base()
    adapter = llama.save_adapter(tmp_path / "adapter", kind=kind, option=OPTIONS[name])
    ours = load_file(merged(llama.folder, adapter).folder / "model.safetensors")
    expected = llama.with_adapter(adapter).merge_and_unload().state_dict()
    assert ours.keys() == expected.keys()
    changed = 0.0
    for key, weight in expected.items():
        assert (ours[key] - weight).abs().max() <= WEIGHT_TOLERANCE, key
        changed = max(changed, float((weight - llama.model.state_dict()[key]).abs().max()))
    assert changed > 1000 * WEIGHT_TOLERANCE


@pytest.mark.parametrize(("name", "kind", "tied"), ANSWERS, ids=["-".join(map(str, case)) for case in ANSWERS])
def test_everything_that_is_served_answers_as_unmerged(base, merged, tmp_path, name, kind, tied):
    llama = base(tied=tied)
    adapter = llama.save_adapter(tmp_path / "adapter", kind=kind, option=OPTIONS[name])
    _check_answers(llama, adapter, merged(llama.folder, adapter).folder)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_every_family(base, merged, tmp_path, family):
    other = base(family)
    option = Option(config={"target_modules": "all-linear", "bias": "all", "modules_to_save": ["norm", "lm_head"]})
    adapter = other.save_adapter(tmp_path / "adapter", kind="dora", option=option)
    _check_answers(other, adapter, merged(other.folder, adapter).folder)


@pytest.mark.parametrize(
    ("family", "targets"), [("llama", "lm_head"), ("mistral", "q_proj"), ("qwen2", "o_proj"), ("qwen3", "up_proj")]
)
def test_a_bias_that_the_family_cannot_have_is_refused(base, merged, tmp_path, family, targets):
    other = base(family)
    option = Option(config={"lora_bias": True, "target_modules": [targets, "v_proj"]})
    adapter = other.save_adapter(tmp_path / "adapter", kind="lora", option=option)
    with pytest.raises(MergeError) as caught:
        merged(other.folder, adapter)
    assert any(targets in reason for reason in caught.value.reasons)
    assert len(caught.value.reasons) == {"llama": 1, "mistral": 4, "qwen2": 2, "qwen3": 2}[family]
    assert not (tmp_path / "merged").exists()


@torch.inference_mode()
def _check_answers(base, adapter, folder):
    token_ids = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0))
    expected, ours, without = (
        model(token_ids).logits
        for model in (base.with_adapter(adapter), AutoModelForCausalLM.from_pretrained(folder), base.model)
    )
    assert (ours - expected).abs().max() <= LOGIT_TOLERANCE
    assert (without - expected).abs().max() > 100 * LOGIT_TOLERANCE
