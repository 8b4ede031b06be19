"""The parts below the services, put together as a server puts them together."""

import pytest
from lorasrv.config import ServeConfig
from lorasrv.embedded import embedded_adapter_root, embedded_adapters
from lorasrv.rpc.backend import Backend
from lorasrv_adapters.errors import AdapterExistsError


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
