"""Promise 1: every kind with every option on every family, mixed with others, answers as PEFT does with it alone."""

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lorasrv.engine.request import Request, SamplingParams
from lorasrv_adapters.checkpoint import read_checkpoint
from lorasrv_adapters.image import pack_image
from peft import PeftModel
from peft_options import KINDS, OPTIONS, Option, save_option
from recorded_engine import Served, run_engine
from tiny_peft import new_base, save_base
from torch import Tensor
from transformers import PreTrainedModel

# fp32 on both sides; logits of these models reach 30, sums run over 192 products in another order
TOLERANCE = 1e-4

BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tied": True}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tied": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tied": True}),
}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 24}
NEIGHBOURS = {
    "neighbour-dora": ("dora", Option(config={"target_modules": "all-linear", "modules_to_save": ["lm_head", "norm"]})),
    "neighbour-lora": ("lora", Option(config={"trainable_token_indices": [65, 66], "bias": "all", "r": 9})),
}
NUM_NEW_TOKENS = 3


def cases() -> Iterator[tuple[str, str, str]]:
    for base, (_, options) in BASES.items():
        for kind in KINDS:
            for name, option in OPTIONS.items():
                if kind in option.kinds and option.tied in (None, bool(options.get("tied"))):
                    yield base, kind, name


CASES = list(cases())


@dataclass(frozen=True, slots=True)
class Bench:
    """One base, served and in transformers, the latter with the weights that the former decodes to."""

    served: Served
    oracle: PreTrainedModel


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bench]:
    benches: dict[str, Bench] = {}

    def make(name: str) -> Bench:
        if name not in benches:
            family, options = BASES[name]
            sizes = SIZES if family == "qwen3" else {key: SIZES[key] for key in ("hidden_size", "intermediate_size")}
            folder = save_base(tmp_path_factory.mktemp(name), family, **options, **sizes)
            served, oracle = Served.load(folder, {}, torch.float32), new_base(family, **options, **sizes)
            for module, facts in served.model.base.modules.items():
                if facts.kind == "linear":
                    rows = served.model.base.weight_rows(module, 0, facts.out_features)
                    oracle.get_submodule(module).weight.data = rows
            bench = benches[name] = Bench(served, oracle)
            for neighbour, (kind, option) in NEIGHBOURS.items():
                adapter_folder = tmp_path_factory.mktemp(neighbour)
                save_option(copy.deepcopy(oracle), adapter_folder, kind=kind, option=option, seed=2)
                serve(bench, neighbour, adapter_folder)
        return benches[name]

    return make


def serve(bench: Bench, adapter_id: str, folder: Path) -> None:
    model = bench.served.model
    adapter = read_checkpoint(folder, model.base)
    bench.served.images[adapter_id] = (adapter.digest, pack_image(adapter, model.base, torch.float32))


def with_peft(oracle: PreTrainedModel, folder: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(oracle), folder).eval()


def requests(served: Served, adapter_id: str) -> list[Request]:
    source = random.Random(0)
    # longer than Mistral's window, of more than one block, and short
    lengths = {f"{adapter_id}/long": 53, f"{adapter_id}/short": 5, **dict.fromkeys(NEIGHBOURS, 9), "": 11}
    return [
        Request(
            request_id=name,
            prompt_token_ids=tuple(source.randrange(256) for _ in range(length)),
            sampling=SamplingParams(max_new_tokens=NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True),
            lease=served.lease(name.partition("/")[0]),
        )
        for name, length in lengths.items()
    ]


@torch.inference_mode()
def logits_of(model: torch.nn.Module, token_ids: list[int]) -> Tensor:
    """The logits [NUM_NEW_TOKENS, V] that chose the last tokens."""
    rows: Tensor = model(torch.tensor([token_ids])).logits[0]
    return rows[-NUM_NEW_TOKENS - 1 : -1]


@pytest.mark.parametrize(("base", "kind", "option"), CASES, ids=["-".join(case) for case in CASES])
def test_peft_matrix(base: str, kind: str, option: str, bench: Callable[[str], Bench], tmp_path: Path) -> None:
    tested = bench(base)
    save_option(copy.deepcopy(tested.oracle), tmp_path, kind=kind, option=OPTIONS[option])
    serve(tested, "tested", tmp_path)
    asked = requests(tested.served, "tested")
    run = run_engine(tested.served, asked, max_rank=40)
    assert run.runner.max_adapters == 3
    alone = with_peft(tested.oracle, tmp_path)
    for request in asked[:2]:
        token_ids = [*request.prompt_token_ids, *run.token_ids(request.request_id)]
        ours = torch.stack([run.runner.rows[request.request_id, position] for position in range(NUM_NEW_TOKENS)])
        expected = logits_of(alone, token_ids)
        assert (ours - expected).abs().max() <= TOLERANCE
        assert (expected - logits_of(tested.oracle, token_ids)).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("base", BASES)
def test_the_base_beside_adapters_answers_as_transformers_does(base: str, bench: Callable[[str], Bench]) -> None:
    tested = bench(base)
    asked = requests(tested.served, "")[2:]
    run = run_engine(tested.served, asked)
    request = asked[-1]
    ours = torch.stack([run.runner.rows[request.request_id, position] for position in range(NUM_NEW_TOKENS)])
    expected = logits_of(tested.oracle, [*request.prompt_token_ids, *run.token_ids(request.request_id)])
    assert (ours - expected).abs().max() <= TOLERANCE
