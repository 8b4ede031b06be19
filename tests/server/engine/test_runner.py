"""The runner: rows of logits meet the right sampling parameters and positions, and slots the right rows."""

from pathlib import Path

import pytest
import torch
from lorasrv.engine.memory import DeviceMemory, image_elements
from lorasrv.engine.request import Request, SamplingParams
from lorasrv.engine.sampler import sample
from lorasrv_kernels.cpu.decoder import NativeDecoder
from recorded_engine import Served, run_engine
from tiny_peft import save_adapter, save_base


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runner")
    save_base(root / "base")
    save_adapter(root / "base", root / "dora", kind="dora", rank=4, seed=1)
    return root


def test_each_row_is_sampled_with_its_own_parameters_and_position(folder: Path) -> None:
    served = Served.load(folder / "base", {"dora": folder / "dora"}, torch.float32)
    requests = [
        Request(
            request_id=str(index),
            prompt_token_ids=tuple(range(1, 10 + index)),
            sampling=SamplingParams(max_new_tokens=8, temperature=5.0, seed=7, ignore_eos=True),
            lease=served.lease("dora" if index % 2 else ""),
        )
        for index in range(4)
    ]
    run = run_engine(served, requests, max_num_seqs=4, max_batched_tokens=20)
    for request in requests:
        rows = torch.stack([run.runner.rows[request.request_id, position] for position in range(8)])
        expected = [token.token_id for token in sample(rows, [request.sampling] * 8, range(8))]
        assert run.token_ids(request.request_id) == expected


def test_the_largest_adapter_always_fits(folder: Path) -> None:
    model = Served.load(folder / "base", {}, torch.bfloat16).model
    memory = DeviceMemory(
        model.config,
        model.base,
        dtype=torch.bfloat16,
        device="cpu",
        kv_bytes=0,
        adapter_bytes=0,
        max_rank=9,
        max_adapters=3,
    )
    assert memory.layout.num_blocks == 1
    assert memory.layout.reserve(image_elements(model.base, rank=9, dtype=torch.bfloat16)) is not None
    assert memory.layout.reserve(1) is None


def test_kernels_are_told_the_highest_rank(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    # on a CPU all layers are one call, which needs no rank
    monkeypatch.setattr(NativeDecoder, "forward", lambda *_, **__: None)
    monkeypatch.setattr("lorasrv.model.adapted_linear.lora_apply_", lambda *_, max_rank, **__: told.append(max_rank))
    served = Served.load(folder / "base", {"dora": folder / "dora"}, torch.float32)
    request = Request(
        request_id="0",
        prompt_token_ids=(1, 2),
        sampling=SamplingParams(max_new_tokens=1),
        lease=served.lease("dora"),
    )
    run_engine(served, [request], max_num_seqs=1, max_batched_tokens=20, max_rank=11)
    assert set(told) == {11}
