"""Captured decode steps on a GPU: what is replayed is what the eager step computes, whatever comes, goes and moves."""

from collections.abc import Iterator

import pytest
import torch
from lorasrv.engine.decode_graphs import CudaGraph, cuda_graphs
from lorasrv.engine.memory import DeviceMemory
from lorasrv.engine.sampler import most_probable
from lorasrv.model.decoder import DecoderModel
from random_llama import TINY, random_adapter, random_llama
from stepped_serving import ComparingRunner, make_requests, serve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; test_decode_graphs.py has a stand-in"),
]

# logits are below 2; the library may add norms and the head's product in another order for another number of rows,
# which moves a result by a few units in the last place of its largest part
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request: pytest.FixtureRequest) -> Iterator[DecoderModel]:
    torch.manual_seed(0)
    yield random_llama({**TINY, "attention_bias": True}, dtype=request.param, device="cuda")
    torch.cuda.empty_cache()


def test_replays_follow_loads_evictions_moves_and_preemption(model: DecoderModel) -> None:
    leases = [random_adapter(model, rank, seed=rank, with_scale=rank % 2 == 0) for rank in (3, 16, 2, 9, 14, 12)]
    for lease in leases:
        lease.image = lease.image.pinned()
    pool = torch.cuda.graph_pool_handle()
    served = serve(
        model,
        make_requests([None, *leases], count=16, longest=31),
        new_graph=lambda: CudaGraph(pool),
        make_runner=ComparingRunner,
        num_blocks=6,
        max_adapters=3,
        adapter_bytes=2 * leases[1].image.flat.nbytes,
    )
    assert min(served.num_preemptions, served.num_evictions, served.num_moves) > 0
    assert len(served.differences) > 20
    assert max(served.differences) <= TOLERANCE[model.dtype]
    assert len(served.token_ids) == 16


def test_every_size_is_captured_and_reports_its_memory(model: DecoderModel, caplog: pytest.LogCaptureFixture) -> None:
    memory = DeviceMemory(
        model.config,
        model.base,
        dtype=model.dtype,
        device=model.device,
        kv_bytes=1 << 20,
        adapter_bytes=1 << 20,
        max_rank=16,
        max_adapters=4,
    )
    with caplog.at_level("INFO"):
        assert cuda_graphs(model, memory, max_num_seqs=16) is not None
    assert "captured 10 decode graphs for batches of up to 16" in caplog.text


def test_a_step_that_waits_is_named_before_it_is_captured() -> None:
    numbers = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
        CudaGraph(torch.cuda.graph_pool_handle()).capture(lambda: print(numbers.sum().item()))


def test_the_greedy_choice_waits_for_nothing() -> None:
    logits = torch.randn(3, 50, device="cuda")
    logits[1, 4] = torch.inf
    torch.cuda.set_sync_debug_mode("error")
    try:
        chosen = most_probable(logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert chosen.tolist() == [int(logits[0].argmax()), -1, int(logits[2].argmax())]
