"""Promise 2: the logits of a request do not depend, in any bit, on who shares its steps or how its prompt is cut."""

import random
from pathlib import Path

import pytest
import torch
from lorasrv.engine.request import Request, SamplingParams
from peft_options import OPTIONS, save_option
from recorded_engine import Run, Served, run_engine
from tiny_peft import new_base, save_adapter, save_base

NUM_REQUESTS = 32


def make_requests(served: Served, adapter_ids: list[str], *, num_requests: int = NUM_REQUESTS) -> list[Request]:
    source = random.Random(1)
    return [
        Request(
            request_id=f"{index}",
            prompt_token_ids=tuple(source.randrange(256) for _ in range(source.randint(1, 100))),
            sampling=SamplingParams(
                max_new_tokens=source.randint(2, 12),
                temperature=source.choice([0.0, 0.8, 1.5]),
                top_k=source.choice([0, 20]),
                top_p=source.choice([1.0, 0.9]),
                seed=index,
                ignore_eos=True,
            ),
            lease=served.lease(adapter_ids[index % len(adapter_ids)]),
        )
        for index in range(num_requests)
    ]


def assert_same_bits(mixed: Run, alone: Run, request: Request) -> None:
    name = request.request_id
    assert mixed.token_ids(name) == alone.token_ids(name)
    assert len(mixed.token_ids(name)) == request.sampling.max_new_tokens
    for position in range(request.sampling.max_new_tokens):
        assert torch.equal(mixed.runner.rows[name, position], alone.runner.rows[name, position]), (name, position)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_neighbours_change_no_bit(
    dtype: torch.dtype,
    base_folder: Path,
    adapter_folders: dict[str, Path],
) -> None:
    served = Served.load(base_folder, adapter_folders, dtype)
    adapter_ids = ["", *adapter_folders]
    # few blocks and short steps, so that prompts are cut and sequences preempted
    mixed = run_engine(served, make_requests(served, adapter_ids), arrival_seed=2, num_blocks=20, max_batched_tokens=48)
    for request in make_requests(served, adapter_ids):
        assert_same_bits(mixed, run_engine(served, [request]), request)
    cut = sum(1 for chunks in mixed.runner.num_chunks.values() if chunks > 1)
    print(
        f"{cut} prompts in several chunks, at most {mixed.runner.max_adapters} adapters in one step, "
        f"{mixed.num_preemptions} preemptions"
    )
    assert cut > 1
    assert mixed.runner.max_adapters >= 5
    assert mixed.num_preemptions > 0


def test_neighbours_change_no_bit_under_a_window(tmp_path: Path) -> None:
    """A family with everything Llama lacks: a window shorter than most prompts, norms of heads, biases."""
    # in the first layer, so that what the second one caches depends on it
    window = {"use_sliding_window": True, "sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]}
    base_folder = save_base(tmp_path, "qwen3", attention_bias=True, **window)
    adapters = {
        kind: save_adapter(base_folder, tmp_path / kind, kind=kind, rank=3 + seed, seed=seed)
        for seed, kind in enumerate(["lora", "dora"])
    }
    served = Served.load(base_folder, adapters, torch.float32)
    assert served.model.config.windows == (40, 0)
    requests = make_requests(served, ["", *adapters], num_requests=12)
    mixed = run_engine(served, requests, arrival_seed=2, num_blocks=6, max_batched_tokens=48)
    for request in make_requests(served, ["", *adapters], num_requests=12):
        assert_same_bits(mixed, run_engine(served, [request]), request)
    assert any(chunks > 1 for chunks in mixed.runner.num_chunks.values())
    assert mixed.runner.max_adapters == 2
    assert mixed.num_preemptions > 0


BESIDE_LOW_RANK = {
    "saved-all-bias": "lora",
    "head-embedding": "dora",
    "tokens-named": "rslora",
    "saved-norms": "adalora",
    "lora-bias-all": "lora",
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_neighbours_change_no_bit_whatever_they_replace(dtype: torch.dtype, tmp_path: Path) -> None:
    """Biases, heads, embeddings, norms and single rows of others, in the same steps as one's own and as none."""
    biased = {"attention_bias": True, "mlp_bias": True}
    (tmp_path / "base").mkdir()
    base_folder = save_base(tmp_path / "base", "llama", **biased)
    for name, kind in BESIDE_LOW_RANK.items():
        save_option(new_base("llama", **biased), tmp_path / name, kind=kind, option=OPTIONS[name])
    served = Served.load(base_folder, {name: tmp_path / name for name in BESIDE_LOW_RANK}, dtype)
    adapter_ids = ["", *BESIDE_LOW_RANK]
    requests = make_requests(served, adapter_ids, num_requests=18)
    mixed = run_engine(served, requests, arrival_seed=3, num_blocks=14, max_batched_tokens=48)
    for request in make_requests(served, adapter_ids, num_requests=18):
        assert_same_bits(mixed, run_engine(served, [request]), request)
    assert any(chunks > 1 for chunks in mixed.runner.num_chunks.values())
    assert mixed.runner.max_adapters >= 4
