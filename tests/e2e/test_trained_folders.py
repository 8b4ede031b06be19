"""What training writes is the adapter that it had: to PEFT over the same base, and to our own server."""

import random
import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lorasrv.engine.request import Request, SamplingParams
from lorasrv.model.loader import load_model
from lorasrv.train.batches import share_out, token_batches
from lorasrv.train.config import JobConfig
from lorasrv.train.data.examples import Example
from lorasrv.train.job import TrainingJob
from lorasrv.train.network import TrainableModel
from lorasrv.train.run import TrainingRun
from peft import PeftModel
from recorded_engine import Run, Served, run_engine
from served_base import as_served
from tiny_peft import save_base
from torch import Tensor

# float32 on both sides; sums over a hundred products in another order
TOLERANCE = 1e-5
NUM_STEPS = 4
NUM_NEW_TOKENS = 6
PATTERNS = {"rank_pattern": ((r"layers\.0\..*", 2), ("q_proj", 5)), "alpha_pattern": (("v_proj", 9.0),)}
WHOLE = {"modules_to_save": ("lm_head", "embed_tokens", "norm")}
UNTIED: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in ("lora", "rslora", "dora", "adalora")},
    **{f"{method}-patterns": {"method": method, **PATTERNS} for method in ("lora", "rslora", "dora")},
    **{f"{method}-whole": {"method": method, **WHOLE} for method in ("lora", "dora", "adalora")},
    "pissa": {"initialization": "pissa"},
    "pissa-rslora-patterns": {"method": "rslora", "initialization": "pissa", **PATTERNS},
}
TIED: dict[str, dict[str, Any]] = {
    "head": {"modules_to_save": ("lm_head",)},
    "embedding": {"method": "dora", "modules_to_save": ("embed_tokens",)},
    "together": {"method": "adalora", **WHOLE, "ensure_weight_tying": True},
    "apart": WHOLE,
}
CASES = [(False, name) for name in UNTIED] + [(True, name) for name in TIED]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Adapters trained together over one base, and what they say before they are written, and as served.

    Attributes:
        base: the base's folder.
        served: the base and the adapters as a server has them.
        folders: of the adapters.
        losses: of `EXAMPLE`, a row each, as training computes them.
        run: greedy answers to one prompt by all adapters in the same steps.
    """

    base: Path
    served: Served
    folders: Mapping[str, Path]
    losses: Mapping[str, Tensor]
    run: Run


def new_example(length: int, *, seed: int) -> Example:
    token_ids = random.Random(seed).choices(range(256), k=length)
    return Example(token_ids=array("i", token_ids), supervised=bytes([1] * length), place="")


EXAMPLES = [new_example(length, seed=length) for length in (9, 17, 23, 30)]
EXAMPLE = EXAMPLES[-1]
PROMPT = tuple(EXAMPLES[0].token_ids)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Mapping[bool, Trained]:
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    return {
        tied: new_trained(save_base(tmp_path_factory.mktemp("base"), "qwen2", tied=tied, **sizes), jobs)
        for tied, jobs in ((False, UNTIED), (True, TIED))
    }


def new_trained(base: Path, options: Mapping[str, Mapping[str, Any]]) -> Trained:
    model = load_model(base, dtype=torch.float32)
    folders = {name: base.parent / f"{base.name}-{name}" for name in options}
    jobs = [
        TrainingJob(
            name,
            JobConfig(out=folders[name], data=(base,), rank=3, learning_rate=3e-2, batch_size=2, **values),
            base=model.base,
            base_name="base",
            examples=EXAMPLES,
            held_out=[],
            max_steps=NUM_STEPS,
            seed=place,
        )
        for place, (name, values) in enumerate(options.items())
    ]
    network = TrainableModel(model, checkpoint_layers=True)
    run = TrainingRun(network, jobs, micro_batch_tokens=2000)
    run.train(range(NUM_STEPS), eval_every=0, report=lambda _: None, save=lambda _: None)
    for job in jobs:
        job.write({}, beside={})
    (batch,) = token_batches(share_out([[EXAMPLE]]), num_adapters=1, max_tokens=100)
    with torch.no_grad():
        losses = {job.name: network.losses(batch, [job.adapter]) / batch.weights[0] for job in jobs}
    served = Served.load(base, dict(folders), torch.float32)
    sampling = SamplingParams(max_new_tokens=NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True)
    requests = [
        Request(request_id=name, prompt_token_ids=PROMPT, sampling=sampling, lease=served.lease(name))
        for name in folders
    ]
    answers = run_engine(served, requests, max_adapters=len(folders))
    return Trained(base=base, served=served, folders=folders, losses=losses, run=answers)


def greedy(model: torch.nn.Module, prompt: Sequence[int]) -> Iterator[Tensor]:
    """The logits of every token that is generated."""
    token_ids = list(prompt)
    for _ in range(NUM_NEW_TOKENS):
        logits: Tensor = model(torch.tensor([token_ids])).logits[0, -1]
        token_ids.append(int(logits.argmax()))
        yield logits


@pytest.mark.parametrize(("tied", "name"), CASES)
@torch.inference_mode()
def test_peft_and_the_server_have_the_adapter_that_was_trained(
    trained: Mapping[bool, Trained], tied: bool, name: str
) -> None:
    found = trained[tied]
    base = as_served(found.base, found.served.model)
    before = base(torch.tensor([EXAMPLE.token_ids])).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = PeftModel.from_pretrained(base, found.folders[name]).eval()
    logits = oracle(torch.tensor([EXAMPLE.token_ids])).logits[0]
    # so that an adapter that does nothing is not taken for one
    assert (logits - before).abs().max() > 1e-2
    expected = F.cross_entropy(logits[:-1], torch.tensor(EXAMPLE.token_ids[1:]), reduction="none")
    torch.testing.assert_close(found.losses[name][:-1], expected, rtol=TOLERANCE, atol=TOLERANCE)
    rows = list(greedy(oracle, PROMPT))
    assert found.run.token_ids(name) == [int(row.argmax()) for row in rows]
    for position, row in enumerate(rows):
        ours = found.run.runner.rows[name, position]
        torch.testing.assert_close(ours, row, rtol=0, atol=TOLERANCE * float(row.abs().max()))
