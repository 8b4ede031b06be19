"""The one native call over all layers: the bits of the ops one after the other, and the ops where it cannot serve."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from lorasrv.engine.request import Request, SamplingParams
from lorasrv.model import native_layers
from lorasrv.model.loader import load_model
from lorasrv_kernels.cpu import library
from lorasrv_kernels.cpu.decoder import NativeDecoder
from lorasrv_kernels.nf4 import NF4Weight, dequantize
from peft_options import OPTIONS, save_option
from recorded_engine import Served, run_engine
from tiny_peft import new_base, save_adapter, save_base

REPLACING = {"saved-all-bias": "lora", "tokens-named": "rslora", "saved-norms": "adalora", "lora-bias-all": "lora"}

pytestmark = pytest.mark.skipif(library.load() is None, reason="native library not built (make native)")

Build = Callable[[Path, torch.dtype], Served]


def replacing(folder: Path, dtype: torch.dtype) -> Served:
    """Adapters with biases, norms and embeddings of their own."""
    biased = {"attention_bias": True, "mlp_bias": True}
    (folder / "base").mkdir()
    base_folder = save_base(folder / "base", "llama", **biased)
    for name, kind in REPLACING.items():
        save_option(new_base("llama", **biased), folder / name, kind=kind, option=OPTIONS[name])
    return Served.load(base_folder, {name: folder / name for name in REPLACING}, dtype)


def windowed(folder: Path, dtype: torch.dtype) -> Served:
    """A window in one layer, norms of heads, biases."""
    window = {"use_sliding_window": True, "sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]}
    base_folder = save_base(folder, "qwen3", attention_bias=True, **window)
    adapters = {
        kind: save_adapter(base_folder, folder / kind, kind=kind, rank=3 + seed, seed=seed)
        for seed, kind in enumerate(["lora", "dora"])
    }
    return Served.load(base_folder, adapters, dtype)


def dense(folder: Path, dtype: torch.dtype) -> Served:
    """A base that is not quantized."""
    served = windowed(folder, dtype)
    served.model = load_model(folder, dtype=dtype, quantize=False)
    return served


def requests_of(served: Served) -> list[Request]:
    sampling = SamplingParams(max_new_tokens=5, temperature=0.0, ignore_eos=True)
    prompts = [tuple((7 * index + place) % 256 for place in range(10 * index + 1)) for index in range(6)]
    names = ["", *served.images] * 2
    return [
        Request(request_id=name + str(index), prompt_token_ids=prompt, sampling=sampling, lease=served.lease(name))
        for index, (name, prompt) in enumerate(zip(names, prompts, strict=False))
    ]


def rows(served: Served) -> dict[tuple[str, int], torch.Tensor]:
    return run_engine(served, requests_of(served), max_batched_tokens=48).runner.rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("build", [replacing, windowed, dense])
def test_one_call_gives_the_bits_of_the_ops(
    build: Build, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = build(tmp_path, dtype)
    served_natively: list[bool] = []
    forward = NativeDecoder.forward

    def recorded(decoder: NativeDecoder, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor | None:
        out = forward(decoder, *args, **kwargs)  # type: ignore[arg-type]
        served_natively.append(out is not None)
        return out

    monkeypatch.setattr(NativeDecoder, "forward", recorded)
    gc.collect()
    fused = rows(served)
    assert served_natively
    assert all(served_natively)
    monkeypatch.setattr(NativeDecoder, "forward", lambda *_, **__: None)
    by_ops = rows(served)
    assert fused.keys() == by_ops.keys()
    assert all(torch.equal(fused[place], by_ops[place]) for place in fused)


def test_weights_may_move_between_steps(tmp_path: Path) -> None:
    served = windowed(tmp_path, torch.bfloat16)
    before = rows(served)
    for _, weight in served.model.stored():
        if isinstance(weight, NF4Weight):
            weight.share_memory()
        else:
            weight.share_memory_()
    assert all(torch.equal(row, before[place]) for place, row in rows(served).items())
    # the old memory still holds the old numbers
    for name, weight in served.model.stored():
        if name.endswith("input_layernorm.weight"):
            weight.mul_(2)
    assert not any(torch.equal(row, before[place]) for place, row in rows(served).items())


def test_layers_of_mixed_weights_are_left_to_the_ops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = windowed(tmp_path, torch.float32)
    described: list[NativeDecoder | None] = []
    build = native_layers.native_layers

    def half_dense(config: object, layers: Sequence[native_layers.Parts], final_norm: object) -> NativeDecoder | None:
        groups, _ = layers[1]
        query, key, value = groups[0].weight(0), groups[0].weight(1), groups[0].weight(2)
        assert isinstance(query, NF4Weight)
        mixed = type(groups[0])([dequantize(query), key, value], first_module=7)
        described.append(build(config, [layers[0], ([mixed, *groups[1:]], layers[1][1])], final_norm))  # type: ignore[arg-type]
        return described[-1]

    monkeypatch.setattr("lorasrv.model.decoder.native_layers", half_dense)
    model = load_model(tmp_path, dtype=torch.float32)
    assert described == [None]
    served.model = model
    assert rows(served)
