"""What a server is told about the machine, and what that means here."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from lorasrv.engine.device import beside_steps, choose_cpu_isa, resolve_exact
from lorasrv.errors import ConfigError
from lorasrv.model.device import resolve_device
from lorasrv_kernels.cpu.isa import Isa, force_isa, forced_isa


@pytest.fixture
def unforced_isa() -> Iterator[None]:
    """The choice is taken back after the test."""
    yield
    force_isa(None)


@pytest.mark.usefixtures("unforced_isa")
def test_cpu_isa_is_chosen_and_given_back() -> None:
    choose_cpu_isa("portable")
    assert forced_isa() is Isa.PORTABLE
    choose_cpu_isa("auto")
    assert forced_isa() is None


@pytest.mark.usefixtures("unforced_isa")
def test_a_cpu_isa_that_the_machine_lacks_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasrv_kernels.cpu.isa.widest_isa", lambda: Isa.AVX2)
    with pytest.raises(ConfigError, match=r"cpu_isa: .* one of portable, avx2 on this machine, got 'avx512'"):
        choose_cpu_isa("avx512")


def test_cuda_without_a_cuda_device_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="device is cuda, but PyTorch finds no CUDA device here; take cpu or auto"):
        resolve_device("cuda")
    assert resolve_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [("auto", "cpu", True), ("auto", "cuda", False), ("on", "cuda", True), ("off", "cpu", False)],
)
def test_exactness_is_the_rule_on_a_cpu_alone(name: str, device: str, expected: bool) -> None:
    assert resolve_exact(name, torch.device(device)) is expected


def test_what_runs_beside_steps_has_a_stream_of_its_own_once_the_base_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr("torch.cuda.synchronize", calls.append)
    monkeypatch.setattr("torch.cuda.Stream", lambda device: f"new stream on {device}")
    monkeypatch.setattr("torch.cuda.stream", lambda stream: calls.append(stream) or nullcontext())
    with beside_steps(torch.device("cuda:0")):
        assert calls == [torch.device("cuda:0"), "new stream on cuda:0"]
    with beside_steps(torch.device("cpu")):
        assert len(calls) == 2
