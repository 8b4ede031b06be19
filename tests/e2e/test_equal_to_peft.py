"""Promise 1: every kind, mixed in one batch with the others and the base, answers as PEFT does with it alone."""

import copy
import random
import warnings
from pathlib import Path

import pytest
import torch
from lorasrv.engine.request import Request, SamplingParams
from peft import PeftModel
from recorded_engine import Served, run_engine
from transformers import LlamaForCausalLM

# fp32 on both sides; logits of this model reach 30, sums run over 192 products in another order
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def oracle(base_folder: Path) -> LlamaForCausalLM:
    """The base in transformers with its decoder linears replaced by what the served base decodes to."""
    model = LlamaForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    base = Served.load(base_folder, {}, torch.float32).model.base
    for name, (out_features, _) in base.modules.items():
        model.get_submodule(name).weight.data = base.weight_rows(name, 0, out_features)
    return model.eval()


def test_mixed_batch_equals_peft_alone(
    base_folder: Path, adapter_folders: dict[str, Path], oracle: LlamaForCausalLM
) -> None:
    served = Served.load(base_folder, adapter_folders, torch.float32)
    source = random.Random(0)
    requests = [
        Request(
            request_id=adapter_id or "base",
            prompt_token_ids=tuple(source.randrange(256) for _ in range(source.randint(3, 90))),
            sampling=SamplingParams(max_new_tokens=6, temperature=0.0, ignore_eos=True),
            lease=served.lease(adapter_id),
        )
        for adapter_id in ["", *adapter_folders]
    ]
    run = run_engine(served, requests)
    assert run.runner.max_adapters == 8
    for request in requests:
        model = copy.deepcopy(oracle)
        if request.lease is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = PeftModel.from_pretrained(model, adapter_folders[request.request_id]).eval()
        prompt, generated = list(request.prompt_token_ids), run.token_ids(request.request_id)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + generated])).logits[0]
        for position in range(6):
            ours = run.runner.rows[request.request_id, position]
            expected = logits[len(prompt) + position - 1]
            assert (ours - expected).abs().max() <= TOLERANCE, (request.request_id, position)


def test_adapters_change_the_answer(base_folder: Path, adapter_folders: dict[str, Path]) -> None:
    served = Served.load(base_folder, adapter_folders, torch.float32)
    requests = [
        Request(
            request_id=adapter_id or "base",
            prompt_token_ids=(1, 2, 3),
            sampling=SamplingParams(max_new_tokens=1, temperature=0.0),
            lease=served.lease(adapter_id),
        )
        for adapter_id in ["", *adapter_folders]
    ]
    rows = list(run_engine(served, requests).runner.rows.values())
    assert len(rows) == 9
    assert min((a - b).abs().max() for i, a in enumerate(rows) for b in rows[:i]) > 100 * TOLERANCE
