"""Every family against transformers: biases, norms of heads, windows, tied heads; quantized or not."""

import copy
import itertools
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lorasrv.model.decoder import DecoderModel
from lorasrv.model.loader import load_model
from lorasrv.model.quantized_writer import write_quantized
from lorasrv.model.tensors import bias_shapes, norm_shapes
from lorasrv_kernels.nf4 import NF4Weight, dequantize
from tiny_peft import FAMILIES, VOCAB_SIZE, new_base, save_base
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

WINDOW_OF_THE_SECOND_LAYER = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
WINDOW_OF_THE_FIRST_LAYER = {
    "use_sliding_window": True,
    "sliding_window": 40,
    "layer_types": ["sliding_attention", "full_attention"],
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-attention-bias": ("llama", {"attention_bias": True}),
    "llama-mlp-bias": ("llama", {"mlp_bias": True, "tied": True}),
    "llama-both-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {}),
    "mistral-short-window": ("mistral", {"sliding_window": 7, "tied": True}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "mistral-head-size": ("mistral", {"head_dim": 64, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tied": True}),
    "qwen2-window": ("qwen2", WINDOW_OF_THE_SECOND_LAYER),
    "qwen2-layer-types": ("qwen2", WINDOW_OF_THE_FIRST_LAYER),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tied": True, "num_key_value_heads": 4}),
    "qwen3-bias": ("qwen3", {"attention_bias": True}),
    "qwen3-window": ("qwen3", WINDOW_OF_THE_SECOND_LAYER),
}
# fp32 on both sides; logits reach 30, sums run over 192 products in another order
TOLERANCE = 1e-4
PROMPT = random.Random(0).sample(range(VOCAB_SIZE), 100)

Made = tuple[Path, PreTrainedModel]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """The folder of a case and the same model in transformers; made once."""
    made: dict[str, Made] = {}

    def find(case: str) -> Made:
        if case not in made:
            family, options = CASES[case]
            made[case] = save_base(tmp_path_factory.mktemp(case), family, **options), new_base(family, **options)
        return made[case]

    return find


def load(folder: Path, *, quantize: bool = True, dtype: torch.dtype = torch.float32) -> DecoderModel:
    return load_model(folder, dtype=dtype, device="cpu", quantize=quantize)


@torch.no_grad()
def oracle_logits(oracle: PreTrainedModel) -> torch.Tensor:
    return oracle(torch.tensor([PROMPT])).logits[0]


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(make, driver, case):
    folder, oracle = make(case)
    expected = oracle_logits(oracle)
    assert expected.abs().max() > 1
    torch.testing.assert_close(driver(load(folder, quantize=False)).run(PROMPT), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_nf4_logits_equal_transformers_with_the_dequantized_weights(make, driver, case):
    folder, oracle = make(case)
    model = load(folder)
    before = oracle_logits(oracle)
    oracle = copy.deepcopy(oracle)
    quantized = {name: weight for name, weight in model.stored() if isinstance(weight, NF4Weight)}
    assert len(quantized) == 14
    for name, weight in quantized.items():
        oracle.get_parameter(name).data.copy_(dequantize(weight))
    expected = oracle_logits(oracle)
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(driver(model).run(PROMPT), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", ["mistral", "mistral-short-window", "qwen2-window", "qwen3-window", "qwen3-bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_chunks_and_decoding_equal_one_prefill_bit_for_bit(make, driver, case, dtype):
    model = load(make(case)[0], dtype=dtype)
    whole = driver(model).run(PROMPT)
    for cuts in ([37, 70], [5, 32, 64], [41, 97, 98, 99], list(range(33, 100))):
        sequence = driver(model)
        pieces = [sequence.run(PROMPT[start:stop]) for start, stop in itertools.pairwise([0, *cuts, 100])]
        assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_tensors_are_those_transformers_saves(make, family):
    folder, oracle = make(family)
    model = load(folder, quantize=False)
    tensors = oracle.state_dict()
    stored = dict(model.stored())
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(stored[name], tensor), name
    assert norm_shapes(model.config) == {name: tuple(t.shape) for name, t in tensors.items() if "norm" in name}
    assert bias_shapes(model.config) == {name: tuple(t.shape) for name, t in tensors.items() if ".bias" in name}


def biases_of(model):
    return {name: module.bias for name, module in model.base.modules.items() if module.bias is not None}


def test_biases_are_told_to_adapters_in_float32(make):
    folder, oracle = make("qwen2")
    biases = biases_of(load(folder, dtype=torch.bfloat16))
    names = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qkv"]
    assert list(biases) == names
    for name in names:
        expected = oracle.get_submodule(name).bias.detach().bfloat16().float()
        assert biases[name].dtype == torch.float32
        assert torch.equal(biases[name], expected)
    assert biases_of(load(make("qwen3")[0])) == {}


def test_told_biases_are_copies(make):
    model = load(make("qwen2")[0])
    name, bias = next(iter(biases_of(model).items()))
    bias.zero_()
    assert dict(model.stored())[f"{name}.bias"].abs().max() > 0


def test_biases_belong_to_the_digest(make, tmp_path):
    digest = load(make("qwen2")[0]).base.digest
    oracle = copy.deepcopy(make("qwen2")[1])
    oracle.get_parameter("model.layers.1.self_attn.v_proj.bias").data[3] += 1
    oracle.save_pretrained(tmp_path)
    assert load(tmp_path).base.digest != digest


@pytest.mark.parametrize("case", [*FAMILIES, "llama-both-biases", "qwen3-bias"])
def test_a_quantized_folder_goes_from_transformers_through_ours_and_back(make, tmp_path, case):
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    with warnings.catch_warnings():
        # bitsandbytes and transformers warn about what they deprecate in each other
        warnings.simplefilter("ignore")
        theirs = AutoModelForCausalLM.from_pretrained(make(case)[0], quantization_config=settings, device_map="cpu")
        theirs.save_pretrained(tmp_path / "theirs")
        ours = load(tmp_path / "theirs")
        write_quantized(ours, source=tmp_path / "theirs", folder=tmp_path / "ours")
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", device_map="cpu")
    assert load(tmp_path / "ours").base.digest == ours.base.digest == load(make(case)[0]).base.digest
    before, after = dict(theirs.named_parameters()), dict(back.named_parameters())
    assert before.keys() == after.keys()
    for name, parameter in before.items():
        assert torch.equal(parameter, after[name]), name
