"""The parts below the services, put together as a server puts them together."""

import pytest
import torch
from lorasrv.config import ServeConfig
from lorasrv.embedded import embedded_adapter_root, embedded_adapters, embedded_base
from lorasrv.errors import ModelLoadError
from lorasrv.merge.app import merge
from lorasrv.merge.config import MergeConfig
from lorasrv.model import loader
from lorasrv.model.quantize_folder import quantize_folder
from lorasrv.rpc.backend import Backend
from lorasrv_adapters.errors import AdapterExistsError
from lorasrv_kernels.cpu.isa import Isa, force_isa, forced_isa
from lorasrv_kernels.nf4 import NF4Weight


def test_loads_and_failures_are_counted_whoever_asks() -> None:
    folders = embedded_adapters()
    backend = Backend.load(
        ServeConfig(adapters=(("poet", str(folders["whitman"])),), adapter_roots=(embedded_adapter_root(),))
    )
    backend.registry.load("bard", str(folders["shakespeare"]))
    with pytest.raises(AdapterExistsError):
        backend.registry.load("bard", str(folders["whitman"]))

    def count(**labels: str) -> float | None:
        base_model = backend.facts.base_model
        return backend.metrics.registry.get_sample_value(
            "lorasrv_adapter_loads_total", {"base_model": base_model, **labels}
        )

    assert count(result="ok", reason="") == 2
    assert count(result="error", reason="ADAPTER_EXISTS") == 1


def test_a_server_starts_from_a_quantized_folder_without_quantizing(tmp_path, monkeypatch) -> None:
    adapters = tuple((name, str(folder)) for name, folder in embedded_adapters().items())
    original = Backend.load(ServeConfig(adapters=adapters))
    quantize_folder(embedded_base(), tmp_path / "nf4")
    monkeypatch.setattr(loader, "quantize", lambda _: pytest.fail("it is quantized already"))
    mapped = Backend.load(ServeConfig(base=str(tmp_path / "nf4"), adapters=adapters))
    assert mapped.facts.base_digest == original.facts.base_digest
    # DoRA's were computed from the rows of the base
    for first, second in zip(mapped.registry.list(), original.registry.list(), strict=True):
        images = [backend.cache.get(record.digest) for backend, record in ((mapped, first), (original, second))]
        assert images[0] is not None
        assert images[1] is not None
        # as bytes: float32 scales lie between the 16-bit numbers
        assert images[0].flat.view(torch.uint8).equal(images[1].flat.view(torch.uint8))


def test_the_instruction_set_is_chosen_before_the_base_is_loaded() -> None:
    try:
        with pytest.raises(ModelLoadError):
            Backend.load(ServeConfig(base="no-such-folder", cpu_isa="portable"))
        assert forced_isa() is Isa.PORTABLE
    finally:
        force_isa(None)


@pytest.mark.parametrize(("asked", "num_quantized"), [("auto", 0), ("off", 0), ("on", 42)])
def test_what_was_merged_is_not_quantized_unless_asked_for(tmp_path, asked, num_quantized) -> None:
    adapter = next(iter(embedded_adapters().values()))
    merge(MergeConfig(adapters=((str(adapter), 1.0),), out=tmp_path / "merged"))
    backend = Backend.load(ServeConfig(base=str(tmp_path / "merged"), quantize_base=asked))
    assert sum(isinstance(weight, NF4Weight) for _, weight in backend.model.stored()) == num_quantized


def test_a_base_that_nothing_was_merged_into_is_quantized_unless_asked_otherwise() -> None:
    for asked, num_quantized in (("auto", 42), ("off", 0)):
        backend = Backend.load(ServeConfig(quantize_base=asked))
        assert sum(isinstance(weight, NF4Weight) for _, weight in backend.model.stored()) == num_quantized
