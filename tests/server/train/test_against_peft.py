"""Losses and gradients of every method are those of PEFT's own modules in transformers' own model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lorasrv.model.decoder import DecoderModel
from lorasrv.model.loader import load_model
from lorasrv.train.adapter import TrainableAdapter
from lorasrv.train.config import JobConfig
from lorasrv.train.job import adapter_config
from lorasrv.train.network import TokenBatch, TrainableModel
from lorasrv_adapters.checkpoint import write_checkpoint
from peft import PeftModel
from served_base import as_served
from tiny_peft import save_base

# PEFT asks transformers in the words of its version 4
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

METHODS = ["lora", "rslora", "dora", "adalora"]
LENGTHS = (7, 19, 1, 12)


def new_adapter(model: DecoderModel, method: str, *, rank: int = 4, seed: int = 0, **options: Any) -> TrainableAdapter:
    """An adapter all of whose tensors are random, so that every gradient is there."""
    job = JobConfig(out=Path("/none"), data=(Path("/none"),), method=method, rank=rank, **options)
    config = adapter_config(job, base_name="base", max_steps=100)
    adapter = TrainableAdapter(config, model.base, seed=seed, dropout=job.dropout)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in adapter.parameters.tensors.items():
        if "magnitude" in name:
            tensor.data *= 1 + 0.2 * torch.randn(tensor.shape, generator=generator)
        elif ".lora_" not in name:
            tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)
        else:
            tensor.data = tensor.data.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    return adapter


def new_batch(vocab_size: int, segments: tuple[tuple[int, ...], ...] = (LENGTHS,)) -> TokenBatch:
    lengths = tuple(length for segment in segments for length in segment)
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(vocab_size, (sum(lengths),), generator=generator)
    weights = torch.rand(sum(lengths), generator=generator) * (torch.rand(sum(lengths), generator=generator) > 0.3)
    targets = token_ids.roll(-1)
    # the last token of a sequence has nothing to predict
    weights[torch.tensor(lengths).cumsum(0) - 1] = 0
    return TokenBatch(
        token_ids=token_ids,
        targets=targets,
        weights=weights,
        lengths=lengths,
        segments=tuple(sum(segment) for segment in segments),
    )


def peft_gradients(
    folder: Path, model: DecoderModel, adapter: TrainableAdapter, batch: TokenBatch, path: Path
) -> tuple[float, Mapping[str, torch.Tensor]]:
    """What PEFT says of the same tensors, one sequence at a time."""
    write_checkpoint(path, *adapter.checkpoint({}))
    oracle = PeftModel.from_pretrained(as_served(folder, model), path, is_trainable=True).train()
    loss = torch.zeros(())
    parts = (tensor.split(batch.lengths) for tensor in (batch.token_ids, batch.targets, batch.weights))
    for token_ids, targets, weights in zip(*parts, strict=True):
        logits = oracle(input_ids=token_ids[None]).logits[0]
        loss = loss + (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum()
    loss.backward()
    gradients = {
        name.removeprefix("base_model.model.").replace(".modules_to_save", "").replace(".default", ""): parameter.grad
        for name, parameter in oracle.named_parameters()
        if parameter.grad is not None
    }
    return float(loss.detach()), {
        name.replace("magnitude_vector.weight", "magnitude_vector"): g for name, g in gradients.items()
    }


def assert_as_in_peft(
    folder: Path, model: DecoderModel, adapter: TrainableAdapter, path: Path, *, checkpoint_layers: bool = False
) -> None:
    batch = new_batch(model.config.vocab_size)
    losses = TrainableModel(model, checkpoint_layers=checkpoint_layers).losses(batch, [adapter])
    losses.sum().backward()
    expected_loss, expected = peft_gradients(folder, model, adapter, batch, path)
    # float32 sums in another order over two layers
    assert float(losses.detach().sum()) == pytest.approx(expected_loss, rel=1e-5)
    assert expected.keys() == adapter.parameters.tensors.keys()
    for name, gradient in expected.items():
        ours = adapter.parameters.tensors[name].grad
        assert ours is not None
        torch.testing.assert_close(ours, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-7, msg=name)


@pytest.mark.parametrize("checkpoint_layers", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients(
    base_folder: Path, load_base: Callable[[], DecoderModel], tmp_path: Path, method: str, checkpoint_layers: bool
) -> None:
    model = load_base()
    adapter = new_adapter(model, method)
    assert_as_in_peft(base_folder, model, adapter, tmp_path / "adapter", checkpoint_layers=checkpoint_layers)


@pytest.mark.parametrize(("family", "options"), [("qwen2", {"tied": True}), ("qwen3", {}), ("mistral", {})])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_every_family(tmp_path: Path, family: str, options: dict[str, Any], method: str) -> None:
    (tmp_path / "base").mkdir()
    folder = save_base(tmp_path / "base", family, **options)
    model = load_model(folder, dtype=torch.float32)
    assert_as_in_peft(folder, model, new_adapter(model, method), tmp_path / "adapter")


WHOLE = {"modules_to_save": ("lm_head", "embed_tokens", "norm")}
PATTERNS = {
    "rank_pattern": ((r"layers\.0\..*", 2), ("q_proj", 7)),
    "alpha_pattern": (("model.layers.1.mlp.down_proj", 3.0), (r".*\.[vq]_proj", 5.0)),
}


@pytest.mark.parametrize("method", METHODS)
def test_weights_trained_as_a_whole(tmp_path: Path, method: str) -> None:
    (tmp_path / "base").mkdir()
    folder = save_base(tmp_path / "base", "qwen3")
    model = load_model(folder, dtype=torch.float32)
    adapter = new_adapter(model, method, **WHOLE)
    # head, embedding, and all norms: of layers, heads and the end
    assert len(adapter.parameters.tensors) - len(new_adapter(model, method).parameters.tensors) == 2 + 2 * 4 + 1
    assert_as_in_peft(folder, model, adapter, tmp_path / "adapter", checkpoint_layers=True)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("saved", [("lm_head",), ("embed_tokens",), ("embed_tokens", "lm_head")])
def test_a_tied_head_goes_its_own_way_unless_asked_not_to(tmp_path: Path, saved: tuple[str, ...], tied: bool) -> None:
    (tmp_path / "base").mkdir()
    folder = save_base(tmp_path / "base", "qwen2", tied=True)
    model = load_model(folder, dtype=torch.float32)
    adapter = new_adapter(model, "lora", modules_to_save=saved, ensure_weight_tying=tied)
    assert_as_in_peft(folder, model, adapter, tmp_path / "adapter")


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_ranks_and_scales_by_pattern(
    base_folder: Path, load_base: Callable[[], DecoderModel], tmp_path: Path, method: str
) -> None:
    model = load_base()
    adapter = new_adapter(model, method, **PATTERNS)
    assert set(adapter.ranks().values()) == {2, 4, 7}
    assert_as_in_peft(base_folder, model, adapter, tmp_path / "adapter")


@pytest.mark.parametrize("method", METHODS)
def test_dropout_where_peft_has_it(
    base_folder: Path,
    load_base: Callable[[], DecoderModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    def drop_every_third(x: torch.Tensor, p: float = 0.5, *_: Any, **__: Any) -> torch.Tensor:
        kept = torch.arange(x.shape[-1]) % 3 > 0
        return x * kept / (1 - p) if p else x

    monkeypatch.setattr(torch.nn.functional, "dropout", drop_every_third)
    model = load_base()
    assert_as_in_peft(base_folder, model, new_adapter(model, method, dropout=0.25), tmp_path / "adapter")


def test_adapters_trained_together_have_the_gradients_of_each_alone(load_base: Callable[[], DecoderModel]) -> None:
    model = load_base()
    network = TrainableModel(model, checkpoint_layers=False)
    segments = ((7, 19), (5,), (1, 12), (8, 3))
    # one has its own head, one its own embedding and norms
    own: dict[str, dict[str, Any]] = {
        "rslora": {"modules_to_save": ("lm_head",), "rank_pattern": (("q_proj", 2),)},
        "dora": {"modules_to_save": ("embed_tokens", "norm")},
    }
    together, alone = (
        [
            new_adapter(model, method, rank=3 + place, seed=place, **own.get(method, {}))
            for place, method in enumerate(METHODS)
        ]
        for _ in range(2)
    )
    batch = new_batch(model.config.vocab_size, segments)
    losses = network.losses(batch, together)
    losses.sum().backward()
    start = 0
    for place, (ours, adapter) in enumerate(zip(together, alone, strict=True)):
        rows = slice(start, start + batch.segments[place])
        part = TokenBatch(
            token_ids=batch.token_ids[rows],
            targets=batch.targets[rows],
            weights=batch.weights[rows],
            lengths=segments[place],
            segments=(batch.segments[place],),
        )
        expected_losses = network.losses(part, [adapter])
        expected_losses.sum().backward()
        torch.testing.assert_close(losses[rows].detach(), expected_losses.detach(), rtol=1e-5, atol=1e-6)
        largest = max(float(buffer.grad.abs().max()) for buffer in adapter.parameters.buffers.values())
        for name, tensor in adapter.parameters.tensors.items():
            # float32 products of another number of rows, through two layers whose terms cancel
            torch.testing.assert_close(
                ours.parameters.tensors[name].grad, tensor.grad, rtol=0, atol=1e-5 * largest, msg=name
            )
        start = rows.stop


def test_an_adapter_without_rows_leaves_the_others_alone(load_base: Callable[[], DecoderModel]) -> None:
    model = load_base()
    adapters = [new_adapter(model, "lora", modules_to_save=("lm_head", "embed_tokens")) for _ in range(2)]
    batch = new_batch(model.config.vocab_size, ((), (7, 19)))
    TrainableModel(model, checkpoint_layers=False).losses(batch, adapters).sum().backward()
    first, second = (adapter.parameters.buffers["weight"].grad for adapter in adapters)
    assert first is not None
    assert second is not None
    assert not first.any()
    assert second.any()
