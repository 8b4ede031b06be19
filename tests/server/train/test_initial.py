"""How adapters begin: exactly as another adapter ends, or at the base's principal directions, which the base keeps."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lorasrv.model.decoder import DecoderModel
from lorasrv.train.adapter import TrainableAdapter
from lorasrv.train.config import JobConfig
from lorasrv.train.job import adapter_config
from lorasrv_adapters.checkpoint import read_checkpoint, write_checkpoint
from lorasrv_adapters.errors import AdapterIncompatibleError
from lorasrv_adapters.normalize import NormalizedAdapter
from tiny_peft import save_adapter


def new_adapter(
    model: DecoderModel,
    method: str,
    *,
    rank: int = 6,
    initialization: str = "default",
    start: NormalizedAdapter | None = None,
) -> TrainableAdapter:
    job = JobConfig(out=Path("/x"), data=(Path("/x"),), method=method, rank=rank, initialization=initialization)  # type: ignore[arg-type]
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
    adapter = new_adapter(model, method, initialization="pissa")
    written = as_read(model, adapter, tmp_path / "adapter")
    for name, module in written.modules.items():
        assert module.rank == 12
        weight = model.base.weight_rows(name, 0, module.b.shape[0])
        # nothing was learned yet, so nothing is changed
        assert (module.b @ module.a).norm() < 1e-5 * weight.norm()
        best = (module.b[:, :6] @ module.a[:6] - weight).norm()
        sizes = torch.linalg.svdvals(weight)
        # randomized: nearly the best approximation of this rank
        assert best < 1.02 * sizes[6:].norm()
    name, module = next(iter(written.modules.items()))
    learned = adapter.parameters.tensors[f"{name}.lora_A.weight"]
    learned.data += 0.1
    again = as_read(model, adapter, tmp_path / "later").modules[name]
    low_rank = adapter.low_rank(name, None)  # type: ignore[arg-type]
    assert low_rank is not None
    torch.testing.assert_close(again.b @ again.a, low_rank.scale * (low_rank.b @ low_rank.a).detach())
