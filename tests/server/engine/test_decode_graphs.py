"""Captured decode steps give the same bits as eager ones, whatever comes, goes and moves between them."""

from typing import Any

import pytest
import torch
from lorasrv.engine.decode_graphs import batch_sizes, cuda_graphs
from lorasrv.model.decoder import DecoderModel
from lorasrv_kernels.attention import SPLIT_BLOCKS, paged_attention, split_blocks
from lorasrv_kernels.cpu.decoder import NativeDecoder
from random_llama import TINY, random_adapter, random_llama
from recorded_graph import RecordedGraph
from stepped_serving import Served, make_requests, serve
from torch import Tensor

BIASED = {**TINY, "attention_bias": True}


@pytest.fixture(autouse=True)
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are made of ops that a graph can record, not of the one native call of a CPU."""
    monkeypatch.setattr(NativeDecoder, "forward", lambda *_, **__: None)


class Graphs:
    """Makes graphs and keeps them."""

    def __init__(self) -> None:
        self.made: list[RecordedGraph] = []

    def __call__(self) -> RecordedGraph:
        self.made.append(RecordedGraph())
        return self.made[-1]

    @property
    def num_replays(self) -> list[int]:
        """Per graph: of one row without and with adapters, of two rows, ..."""
        return [graph.num_replays for graph in self.made]


def assert_same_bits(captured: Served, eager: Served) -> None:
    assert captured.token_ids == eager.token_ids
    assert captured.rows.keys() == eager.rows.keys()
    for key, row in captured.rows.items():
        assert torch.equal(row, eager.rows[key]), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_captured_steps_have_the_bits_of_eager_ones(dtype: torch.dtype) -> None:
    """Adapters come and are evicted, arena and batch move, sequences are preempted: one capture serves it all."""
    torch.manual_seed(0)
    model = random_llama(TINY, dtype=dtype)
    leases = [random_adapter(model, rank, seed=rank, with_scale=rank % 2 == 0) for rank in (3, 16, 2, 9, 14, 12)]
    requests = make_requests([None, *leases], count=16, longest=31)
    room = {
        "num_blocks": 6,
        "max_adapters": 3,
        # two of the largest
        "adapter_bytes": 2 * leases[1].image.flat.nbytes,
    }
    graphs = Graphs()
    captured = serve(model, requests, new_graph=graphs, **room)
    assert_same_bits(captured, serve(model, requests, new_graph=None, **room))
    assert captured.num_preemptions > 0
    assert captured.num_evictions > 0
    assert captured.num_moves > 0
    print(f"{graphs.num_replays} replays, {captured.num_evictions} evictions, {captured.num_moves} moves")
    # with adapters, for 1, 2, 4 and 8 sequences
    assert all(graphs.num_replays[1::2])


def test_a_bias_reaches_every_row() -> None:
    torch.manual_seed(0)
    model = random_llama(BIASED)
    leases = [random_adapter(model, 4, seed=0, with_scale=True), random_adapter(model, 3, seed=1)]
    requests = make_requests([None, *leases], count=6)
    assert_same_bits(serve(model, requests, new_graph=RecordedGraph), serve(model, requests, new_graph=None))


def test_what_replaces_weights_runs_eagerly() -> None:
    torch.manual_seed(0)
    model = random_llama(TINY)
    replacing = [
        random_adapter(model, 2, seed=0, also=("lm_head",)),
        random_adapter(model, 2, seed=1, also=("model.embed_tokens",)),
        random_adapter(model, 2, seed=2, also=("model.layers.1.input_layernorm",)),
    ]
    requests = make_requests(replacing, count=6)
    graphs = Graphs()
    captured = serve(model, requests, new_graph=graphs)
    assert not any(graphs.num_replays)
    assert_same_bits(captured, serve(model, requests, new_graph=None))
    alone = serve(model, make_requests([replacing[0], None], count=2), new_graph=graphs)
    assert any(graphs.num_replays)
    assert len(alone.token_ids) == 2


def test_batches_without_an_adapter_have_graphs_of_their_own() -> None:
    torch.manual_seed(0)
    model = random_llama(TINY)
    graphs = Graphs()
    serve(model, make_requests([None], count=3), new_graph=graphs)
    plain, adapted = graphs.num_replays[::2], graphs.num_replays[1::2]
    assert sum(plain) > 0
    assert sum(adapted) == 0
    names = {call[0] for graph in graphs.made[::2] for call in graph.calls}
    assert not any("lora" in name for name in names if "lorasrv.lora" in name)
    assert any("lorasrv.lora_apply_" in call[0] for call in graphs.made[1].calls)


def test_all_steps_cut_attention_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    told = set()

    def attend(*arguments: Any, **options: Any) -> Tensor:
        told.add(arguments[2].split_blocks)
        return paged_attention(*arguments, **options)

    monkeypatch.setattr("lorasrv.model.attention.paged_attention", attend)
    model = random_llama({**TINY, "max_position_embeddings": 32768})
    serve(model, make_requests([None], count=2), new_graph=RecordedGraph)
    assert told == {split_blocks(32768)}
    assert split_blocks(32768) != SPLIT_BLOCKS


def test_sizes_are_powers_of_two() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(5) == [1, 2, 4, 8]
    assert batch_sizes(8) == [1, 2, 4, 8]


def test_a_cpu_has_no_graphs() -> None:
    model: DecoderModel = random_llama(TINY)
    assert cuda_graphs(model, None, max_num_seqs=4) is None  # type: ignore[arg-type]


def test_a_graph_that_would_do_other_work_is_found() -> None:
    """The stand-in itself: what a CUDA graph would get wrong fails."""
    numbers = {"scale": 2.0, "data": torch.ones(3)}

    def run() -> None:
        numbers["data"] * numbers["scale"]

    graph = RecordedGraph()
    graph.capture(run)
    graph.replay()
    numbers["scale"] = 3.0
    with pytest.raises(AssertionError, match="not the one captured"):
        graph.replay()
    numbers.update(scale=2.0, data=torch.ones(3))
    with pytest.raises(AssertionError, match="not the one captured"):
        graph.replay()


@pytest.mark.parametrize(
    "read",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor[[0, 1]],
        lambda tensor: tensor + torch.tensor([1.0, 2.0, 3.0]),
        lambda tensor: bool(tensor.any()),
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor.numpy(),
    ],
    ids=["item", "mask", "list", "constant", "branch", "tolist", "numpy"],
)
def test_a_step_that_needs_the_host_is_found(read: object) -> None:
    with pytest.raises(AssertionError, match="host"):
        RecordedGraph().capture(lambda: read(torch.ones(3)))  # type: ignore[operator]
