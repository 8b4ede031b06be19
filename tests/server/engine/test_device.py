"""The instruction set of native kernels, as a server is told."""

from collections.abc import Iterator

import pytest
from lorasrv.engine.device import choose_cpu_isa
from lorasrv.errors import ConfigError
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
