"""Whole steps through the kernels for CUDA, interpreted: prefill, decode and batches filled up for a graph."""

from collections.abc import Iterator

import pytest
import torch
from interpreter import INTERPRETING, run_interpreted
from lorasrv_kernels import operators
from lorasrv_kernels.cpu.decoder import NativeDecoder
from random_llama import TINY, random_adapter, random_llama
from recorded_graph import RecordedGraph
from stepped_serving import Served, make_requests, serve

pytest.importorskip("triton")

OPS = (
    *("store_kv_", "paged_attention", "dense_linear_", "lora_apply_", "nf4_dequantize_", "nf4_linear_"),
    *("rms_norm", "rotate_", "silu_mul"),
)


@pytest.mark.skipif(INTERPRETING, reason="this is the interpreter")
def test_through_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What serves CUDA tensors serves those of the CPU."""
    monkeypatch.setattr(NativeDecoder, "forward", lambda *_, **__: None)
    library = torch.library.Library("lorasrv", "FRAGMENT")
    for name in OPS:
        library.impl(name, operators.versions[name, "CUDA"], "CPU", allow_override=True)
    yield
    library._destroy()


@pytest.mark.gpu
@pytest.mark.skipif(not INTERPRETING, reason="test_cuda_graphs.py does this on a GPU")
# rows that fill a batch up attend to nothing, and what follows computes with whatever lay in memory
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Warning only once for all operators:UserWarning")
@pytest.mark.parametrize("exact", [True, False])
def test_steps_answer_as_on_a_cpu(exact: bool, request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    model = random_llama({**TINY, "num_hidden_layers": 1, "attention_bias": True})
    leases = [random_adapter(model, 3, seed=0, with_scale=True), random_adapter(model, 2, seed=1), None]
    requests = make_requests(leases, count=3, longest=20, most_tokens=4)

    def run(*, captured: bool) -> Served:
        return serve(model, requests, new_graph=RecordedGraph if captured else None, max_num_seqs=2, exact=exact)

    expected = run(captured=False)
    request.getfixturevalue("as_on_cuda")
    captured = run(captured=True)
    assert captured.rows.keys() == expected.rows.keys()
    for key, row in captured.rows.items():
        # float32 sums in another order over logits below 2
        torch.testing.assert_close(row, expected.rows[key], rtol=1e-4, atol=1e-4)
    if exact:
        eager = run(captured=False)
        assert all(torch.equal(row, eager.rows[key]) for key, row in captured.rows.items())
