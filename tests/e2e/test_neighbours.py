"""Promise 2: the logits of a request do not depend, in any bit, on who shares its steps or how its prompt is cut."""

import random
from pathlib import Path

import pytest
import torch
from lorasrv.engine.request import Request, SamplingParams
from recorded_engine import Run, Served, run_engine

NUM_REQUESTS = 32


def make_requests(served: Served, adapter_ids: list[str]) -> list[Request]:
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
        for index in range(NUM_REQUESTS)
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
