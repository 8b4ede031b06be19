"""How adapters begin: exactly as another adapter ends, or at the base's principal directions, which the base keeps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lorasrv.model.decoder import DecoderModel
from lorasrv.model.loader import load_model
from lorasrv.train.adapter import TrainableAdapter
from lorasrv.train.config import JobConfig
from lorasrv.train.job import adapter_config
from lorasrv_adapters.checkpoint import read_checkpoint, write_checkpoint
from lorasrv_adapters.errors import AdapterIncompatibleError
from lorasrv_adapters.normalize import NormalizedAdapter
from tiny_peft import save_adapter, save_base


def new_adapter(
    model: DecoderModel,
    method: str,
    *,
    rank: int = 6,
    initialization: str = "default",
    start: NormalizedAdapter | None = None,
    **options: Any,
) -> TrainableAdapter:
    options |= {"method": method, "rank": rank, "initialization": initialization}
    job = JobConfig(out=Path("/x"), data=(Path("/x"),), **options)
    config = adapter_config(job, base_name="base", max_steps=10)
    return TrainableAdapter(config, model.base, seed=0, initialization=initialization, start=start)


def as_read(model: DecoderModel, adapter: TrainableAdapter, folder: Path) -> NormalizedAdapter:
    masks = {name: torch.ones(len(triplet.e), dtype=torch.bool) for name, triplet in adapter.triplets().items()}
    write_checkpoint(folder, *adapter.checkpoint(masks))
    return read_checkpoint(folder, model.base)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *[("lora", method) for method in ("lora", "rslora", "dora", "adalora")],
        *[("adalora", method) for method in ("lora", "adalora")],
        ("rslora", "adalora"),
        ("dora", "dora"),
    ],
)
def test_an_adapter_goes_on_exactly_where_another_is(
    base_folder: Path, load_base: Callable[[], DecoderModel], tmp_path: Path, kind: str, method: str
) -> None:
    model = load_base()
    start = read_checkpoint(save_adapter(base_folder, tmp_path / "start", kind=kind, rank=5, seed=3), model.base)
    found = as_read(model, new_adapter(model, method, start=start), tmp_path / "next")
    for name, module in start.modules.items():
        ours, update = found.modules[name], module.b @ module.a
        # QR and SVD in float32
        assert (ours.b @ ours.a - update).norm() < 2e-6 * update.norm(), name
        if module.d is not None:
            assert ours.d is not None
            torch.testing.assert_close(ours.d, module.d, rtol=1e-5, atol=1e-6)
        elif method == "dora":
            assert ours.d is not None
            torch.testing.assert_close(ours.d, torch.ones_like(ours.d), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_whole_weights_go_on_where_they_were(
    load_base: Callable[[], DecoderModel], tmp_path: Path, method: str
) -> None:
    model = load_base()
    first = new_adapter(model, "lora", modules_to_save=("lm_head",), rank_pattern=(("q_proj", 3),))
    weight = first.replacement("lm_head")
    assert weight is not None
    torch.testing.assert_close(weight.detach(), model.base.weight_rows("lm_head", 0, len(weight)), rtol=0, atol=0)
    weight.data += 1
    start = as_read(model, first, tmp_path / "first")
    after = new_adapter(model, method, start=start, modules_to_save=("lm_head", "norm"))
    assert torch.equal(after.parameters.tensors["lm_head.weight"], weight)
    norm = after.replacement("model.norm")
    assert norm is not None
    assert torch.equal(norm.detach(), model.base.weight_rows("model.norm", 0, len(norm)))
    with pytest.raises(AdapterIncompatibleError, match="lm_head: the adapter to go on from has it"):
        new_adapter(model, method, start=start)


def test_two_weights_do_not_become_one(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    model = load_model(save_base(tmp_path / "base", tied=True), dtype=torch.float32)
    both = {"modules_to_save": ("lm_head", "embed_tokens")}
    untied = new_adapter(model, "lora", **both)
    tied = new_adapter(
        model, "lora", start=as_read(model, untied, tmp_path / "alike"), ensure_weight_tying=True, **both
    )
    assert tied.replacement("lm_head") is tied.replacement("model.embed_tokens")
    untied.parameters.tensors["lm_head.weight"].data += 1
    start = as_read(model, untied, tmp_path / "apart")
    with pytest.raises(AdapterIncompatibleError, match=r"lm_head: .* another weight for model.embed_tokens"):
        new_adapter(model, "lora", start=start, ensure_weight_tying=True, **both)


def test_a_head_is_trained_as_a_whole_or_not_at_all(load_base: Callable[[], DecoderModel]) -> None:
    with pytest.raises(AdapterIncompatibleError, match=r"lm_head: .* modules_to_save names as a whole"):
        new_adapter(load_base(), "lora", target_modules=("q_proj", "lm_head"))
    with pytest.raises(AdapterIncompatibleError) as caught:
        new_adapter(load_base(), "lora", rank_pattern=(("none", 3),), modules_to_save=("q_proj", "gone"))
    assert len(caught.value.reasons) == 4


def test_triplets_begin_orthonormal(base_folder: Path, load_base: Callable[[], DecoderModel], tmp_path: Path) -> None:
    model = load_base()
    start = read_checkpoint(save_adapter(base_folder, tmp_path / "start", kind="lora", rank=5, seed=3), model.base)
    for triplet in new_adapter(model, "adalora", start=start).triplets().values():
        one = torch.eye(len(triplet.e))
        torch.testing.assert_close(triplet.p.T @ triplet.p, one, rtol=0, atol=2e-6)
        torch.testing.assert_close(triplet.q @ triplet.q.T, one, rtol=0, atol=2e-6)


def test_what_cannot_go_on_is_refused_module_by_module(
    base_folder: Path, load_base: Callable[[], DecoderModel], tmp_path: Path
) -> None:
    model = load_base()
    dora = read_checkpoint(save_adapter(base_folder, tmp_path / "dora", kind="dora", rank=5, seed=3), model.base)
    with pytest.raises(AdapterIncompatibleError) as caught:
        new_adapter(model, "lora", start=dora)
    assert len(caught.value.reasons) == len(dora.modules)
    assert "only DoRA does it" in caught.value.reasons[0]
    with pytest.raises(AdapterIncompatibleError, match="its rank is 5, above the 4 asked for"):
        new_adapter(model, "dora", rank=4, start=dora)


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_principal_directions_are_found_and_subtracted(
    load_base: Callable[[], DecoderModel], tmp_path: Path, method: str
) -> None:
    model = load_base()
    patterns = {"rank_pattern": (("v_proj", 4),), "alpha_pattern": (("o_proj", 30.0), ("v_proj", 3.0))}
    adapter = new_adapter(model, method, initialization="pissa", **patterns)
    written = as_read(model, adapter, tmp_path / "adapter")
    for name, module in written.modules.items():
        rank = 4 if name.endswith("v_proj") else 6
        assert module.rank == 2 * rank
        weight = model.base.weight_rows(name, 0, module.b.shape[0])
        # nothing was learned yet, so nothing is changed
        assert (module.b @ module.a).norm() < 1e-5 * weight.norm()
        best = (module.b[:, :rank] @ module.a[:rank] - weight).norm()
        sizes = torch.linalg.svdvals(weight)
        # randomized: nearly the best approximation of this rank
        assert best < 1.02 * sizes[rank:].norm()
    for name in written.modules:
        adapter.parameters.tensors[f"{name}.lora_A.weight"].data += 0.1
    for name, again in as_read(model, adapter, tmp_path / "later").modules.items():
        low_rank = adapter.low_rank(name, None)  # type: ignore[arg-type]
        assert low_rank is not None
        torch.testing.assert_close(again.b @ again.a, low_rank.scale * (low_rank.b @ low_rank.a).detach())
